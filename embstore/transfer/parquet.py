"""Tables as Parquet files: a fixed-size list of float32 a vector, zstd, facts in the file's metadata.

Pages carry checksums, which are looked at when a file is read: a bit that has changed since is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import UsageError
from embstore.transfer.files import whole
from embstore.transfer.reading import LARGEST_DIM, Spot, Tell, batch_rows, find_columns, read_facts, root_of
from embstore.transfer.table import Batch, Field, Table

_FACTS = b"embstore"
_LEVEL = 1
"""Of zstd: vectors hardly shrink, and a higher one takes longer than to read them from the database."""


def pyarrow(what: str = "--format parquet", otherwise: str = ", or use --format npz") -> tuple[Any, Any]:
    """The package, which is optional; `what` needs it, and `otherwise` says what does not. Raises UsageError."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{what} needs pyarrow: type 'pip install pyarrow'{otherwise}") from None
    return pyarrow, pyarrow.parquet


def write(folder: Path, table: Table) -> Path:
    """Write `KIND.parquet` into the folder; returns its path."""
    arrow, parquet = pyarrow()
    schema = _schema(arrow, table.fields, table.dim).with_metadata({_FACTS: table.facts.to_json()})
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
            writer.write_batch(_record_batch(arrow, batch, table.fields, schema))
    return path


def to_arrow(batches: Iterable[Batch], fields: Sequence[Field], dim: int) -> Any:
    """A `pyarrow.Table` of these columns, a chunk a batch, without a copy of the vectors. Raises UsageError."""
    arrow, _ = pyarrow("an Arrow table", "")
    schema = _schema(arrow, fields, dim)
    return arrow.Table.from_batches([_record_batch(arrow, batch, fields, schema) for batch in batches], schema)


def _schema(arrow: Any, fields: Sequence[Field], dim: int) -> Any:
    types = _types(arrow, dim)
    return arrow.schema([(field.name, types[field.type]) for field in fields])


def _record_batch(arrow: Any, batch: Batch, fields: Sequence[Field], schema: Any) -> Any:
    columns = [_to_arrow(arrow, batch[field.name], schema.field(field.name).type, field) for field in fields]
    return arrow.record_batch(columns, schema=schema)


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


class Reader:
    """A Parquet file. Opening it reads its end. Raises UsageError where it is damaged or lacks a column."""

    def __init__(self, path: Path) -> None:
        self._arrow, self._parquet = pyarrow()
        self._path = path
        with self._reading() as file:
            metadata = file.schema_arrow.metadata or {}
            self.facts = read_facts(metadata[_FACTS], f"'{path}'") if _FACTS in metadata else None
            self._columns = find_columns({name: name for name in file.schema_arrow.names}, f"'{path}' has no column")
            self.root = root_of(self.facts)
            self.rows: int | None = int(file.metadata.num_rows)
            self.dim = self._find_dim(file)
            self._check_size(file)

    def where(self, row: int) -> str:
        """Name a row."""
        return f"'{self._path.name}' row {row}"

    def batches(self, tell: Tell) -> Iterator[Batch]:
        """The rows; those without a vector of the file's dimension are left out and told of."""
        first = 1
        with self._reading() as file:
            names = [name for name, _ in self._columns]
            for record in file.iter_batches(batch_size=self._size(file), columns=names):
                yield self._batch(record, first, tell)
                first += len(record)

    def _batch(self, record: Any, first: int, tell: Tell) -> Batch:
        rows = np.arange(first, first + len(record))
        matrix, good = self._vectors(record.column(self._vector_column()))
        if not good.all():
            for row in rows[~good].tolist():
                tell(Spot(self.where(row), f"no vector of {self.dim} values"))
            record, rows = record.filter(self._arrow.array(good)), rows[good]
        batch: Batch = {"row": rows, "embedding": matrix}
        for name, field in self._columns:
            if field.type != "vector":
                batch[field.name] = _from_arrow(self._arrow, record.column(name), field, self._path)
        return batch

    def _vectors(self, column: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Vectors, [good, dim], and which rows they are of, bool [n]."""
        arrow, compute = self._arrow, self._arrow.compute
        if column.null_count and arrow.types.is_fixed_size_list(column.type):
            column = column.cast(arrow.list_(column.type.value_type))
        good = np.asarray(compute.fill_null(compute.list_value_length(column), -1)) == self.dim
        values = column.flatten()
        if values.null_count:
            good[np.asarray(compute.list_parent_indices(column).filter(values.is_null()))] = False
        if not good.all():
            values = column.filter(arrow.array(good)).flatten()
        return values.to_numpy(zero_copy_only=False).reshape(-1, max(self.dim, 1)), good

    def _find_dim(self, file: Any) -> int:
        """Length of the vectors: of the type, as the facts say, or of the first one."""
        name = self._vector_column()
        type_ = file.schema_arrow.field(name).type
        types = self._arrow.types
        is_list = types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
        if not is_list or not (types.is_floating(type_.value_type) or types.is_integer(type_.value_type)):
            raise UsageError(f"'{self._path}': column '{name}' is {type_}, not a list of numbers")
        if types.is_fixed_size_list(type_):
            return int(type_.list_size)
        if self.facts and self.facts.dim:
            return self.facts.dim
        for record in file.iter_batches(batch_size=100, columns=[name]):
            lengths = [len(value) for value in record.column(0) if value.is_valid]
            if lengths:
                return lengths[0]
        return 0

    def _vector_column(self) -> str:
        return next(str(name) for name, field in self._columns if field.type == "vector")

    def _check_size(self, file: Any) -> None:
        """Raise UsageError for a small file that unpacks to lists which no memory holds."""
        name = self._vector_column()
        for group in (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)):
            for column in (group.column(i) for i in range(group.num_columns)):
                is_vector = column.path_in_schema.partition(".")[0] == name
                if is_vector and column.num_values > max(1, group.num_rows) * LARGEST_DIM:
                    raise UsageError(f"'{self._path}' holds vectors of more than {LARGEST_DIM:,} values")

    def _size(self, file: Any) -> int:
        """Rows of a batch."""
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        return max(100, batch_rows(max(size // max(file.metadata.num_rows, 1), 4 * self.dim)))

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            # Without buffering ahead, which would hold all of a row group, of which a file may have but one.
            file = self._parquet.ParquetFile(
                self._path, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20
            )
            with file:
                yield file
        except (self._arrow.ArrowException, OSError) as error:
            words = " ".join(str(error).split())[:200]
            raise UsageError(f"'{self._path}' is no Parquet file, or it is damaged: {words}") from None


def _from_arrow(arrow: Any, column: Any, field: Field, path: Path) -> Any:
    types = {"text": arrow.string(), "double": arrow.float64()}
    try:
        column = column.cast(types[field.type])
    except arrow.ArrowException:
        raise UsageError(f"'{path}': column '{field.name}' is {column.type}, not {types[field.type]}") from None
    if field.type == "text":
        return column.to_pylist()
    return column.to_numpy(zero_copy_only=False)
