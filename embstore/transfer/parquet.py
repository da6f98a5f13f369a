"""Tables as Parquet files: a fixed-size list of float32 a vector, zstd, facts in the file's metadata.

Pages carry checksums: a reader that looks at them finds a bit that has changed since.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embstore.errors import UsageError
from embstore.transfer.files import whole
from embstore.transfer.table import Field, Table

_FACTS = b"embstore"
_LEVEL = 1
"""Of zstd: vectors hardly shrink, and a higher one takes longer than to read them from the database."""


def pyarrow() -> tuple[Any, Any]:
    """The package, which is optional. Raises UsageError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("--format parquet needs pyarrow: type 'pip install pyarrow', or use --format npz") from None
    return pyarrow, pyarrow.parquet


def write(folder: Path, table: Table) -> Path:
    """Write `KIND.parquet` into the folder; returns its path."""
    arrow, parquet = pyarrow()
    types = _types(arrow, table.dim)
    schema = arrow.schema(
        [(field.name, types[field.type]) for field in table.fields], metadata={_FACTS: table.facts.to_json()}
    )
    texts = [field.name for field in table.fields if field.type == "text"]
    options = {
        "compression": "zstd",
        "compression_level": _LEVEL,
        "use_dictionary": texts,
        "write_statistics": [field.name for field in table.fields if field.type != "vector"],
        "write_page_checksum": True,
    }
    path = folder / f"{table.facts.kind}.parquet"
    with whole(path) as file, parquet.ParquetWriter(file, schema, **options) as writer:
        for batch in table.batches:
            columns = [_to_arrow(arrow, batch[field.name], types[field.type], field) for field in table.fields]
            writer.write_batch(arrow.record_batch(columns, schema=schema))
    return path


def _types(arrow: Any, dim: int) -> dict[str, Any]:
    return {
        "text": arrow.string(),
        "int": arrow.int64(),
        "double": arrow.float64(),
        "real": arrow.float32(),
        "vector": arrow.list_(arrow.float32(), dim),
        "ints": arrow.list_(arrow.int64()),
        "texts": arrow.list_(arrow.string()),
    }


def _to_arrow(arrow: Any, values: Any, type_: Any, field: Field) -> Any:
    if field.type == "vector":
        return arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])
    # pandas' rule, which makes a null of NaN, for numbers only.
    return arrow.array(values, type_, from_pandas=field.type in ("double", "real"))
