"""Arrays and built-ins come out of a pickle as they went in; anything else is refused, and no code of it runs."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from embstore.transfer import unpickle
from embstore.transfer.unpickle import Refused

SOAK = "EMBSTORE_TEST_SOAK" in os.environ
fuzz = settings(
    max_examples=5000 if SOAK else 150,
    derandomize=not SOAK,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

VALUE: dict[str, Any] = {
    "embedding": np.arange(5, dtype=np.float32),
    "big endian": np.arange(3, dtype=">f8"),
    "by columns": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "scalar": np.float64(0.5),
    "texts": np.array(["a", "böb"]),
    "list": [1, -(1 << 70), 2.5, True, None, "text", b"bytes", (1, (2,)), {"x": {3, 4}}],
}


def same(found: Any, value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic):
        return (
            isinstance(found, np.ndarray | np.generic)
            and found.dtype == value.dtype
            and found.shape == value.shape
            and found.tobytes() == value.tobytes()
        )
    if isinstance(value, dict):
        return found.keys() == value.keys() and all(same(found[key], value[key]) for key in value)
    return type(found) is type(value) and found == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_built_ins_come_out_as_they_went_in(protocol: int) -> None:
    assert same(unpickle.load(pickle.dumps(VALUE, protocol)), VALUE)
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert same(unpickle.load(pickle.dumps(array, protocol)), array)


class Runs:
    """Unpickled by Python itself, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class BuildsBad:
    def __reduce__(self) -> Any:
        return np.load, ("x.npy",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    for value in (Runs(mark), {"embedding": VALUE["embedding"], "x": [Runs(mark)]}):
        with pytest.raises(Refused, match="which is neither an array nor built in"):
            unpickle.load(pickle.dumps(value, protocol))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Runs(mark), protocol))
    assert mark.exists()  # that is, it was a real one


@pytest.mark.parametrize(
    "value",
    [OrderedDict(a=1), Path("x"), BuildsBad(), np.array([{"a": 1}], dtype=object), np.zeros(2, dtype="f4,i4"),
     np.array(["2026-01-01"], dtype="datetime64[D]"), eval, range(3), 1j, np.float32, slice(1)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_neither_is_refused(value: Any) -> None:
    with pytest.raises(Refused):
        unpickle.load(pickle.dumps(value, 4))


GADGETS = {
    "a function of numpy's": b"cnumpy\nload\n(Vx\ntR.",
    "an attribute of builtins": b"cbuiltins\ngetattr\n(cbuiltins\nbytes\nVfromhex\ntR.",
    "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
    "a type of its own": b"\x80\x02cnumpy\ndtype\n(Vf4\ntR}Vx\nVy\nsb.",
    "attributes of a stand-in": b"ccodecs\nencode\n}Vx\nVy\nsb.",
    "a persistent id": b"Pabc\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "only a stop": b".",
    "no stop": b"\x80\x04N",
    "a length beyond the end": b"\x80\x04B\xff\xff\xff\x7fabc.",
    "a length of eight bytes": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00abc.",
    "a high number in the memo": b"\x80\x02Nr\xff\xff\xff\x1f.",
    "a high number in the memo, as text": b"Np999999999\n.",
    "itself": b"\x80\x04]\x94h\x00a.",
    "itself as a key": b"\x80\x04}\x94h\x00K\x01s.",
    "many levels": b"\x80\x04" + b"]\x94" * 5000 + b"a" * 4999 + b".",
    "a number beyond all measure": b"I" + b"9" * 6000 + b"\n.",
    "an array without a state": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
    "an array of a state that is none": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)RNb.",
}


@pytest.mark.parametrize("data", GADGETS.values(), ids=list(GADGETS))
def test_a_gadget_is_refused(data: bytes) -> None:
    with pytest.raises(Refused):
        unpickle.load(data)


def test_an_array_that_is_smaller_or_larger_than_it_says_is_refused() -> None:
    data = pickle.dumps(np.arange(5, dtype=np.float32), 2)
    for shape in (b"K\x04", b"K\x06", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"):
        with pytest.raises(Refused, match="damaged"):
            unpickle.load(data.replace(b"K\x05", shape))


def only_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(only_plain, (*value, *value.values())))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(only_plain, value))
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biufSU"
    return value is None or isinstance(value, bool | int | float | str | bytes)


def check(data: bytes) -> None:
    """Either refused, or nothing but arrays and built-ins; any other error fails the test."""
    with contextlib.suppress(Refused):
        assert only_plain(unpickle.load(data))


@fuzz
@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    check(data)
    check(b"\x80\x04" + data + b".")


BARE = b"(.0125NQRabdefhijloqrstu}])\x80\x81\x82\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"
NAMES = [
    *("numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct", "numpy.core.multiarray scalar"),
    *("numpy._core.numeric _frombuffer", "_codecs encode", "builtins set", "builtins bytes", "os system"),
]
VALUES = [b"K\x01", b"K\x04", b"Vf4\n", b"V<\n", b"Vlatin1\n", b"h\x00", b"q\x00", b"C\x04abcd", b"\x8c\x02<f", b"F2\n"]
INSTRUCTIONS = st.one_of(
    st.sampled_from([bytes([code]) for code in BARE]),
    st.sampled_from([f"c{name}\n".replace(" ", "\n").encode() for name in NAMES]),
    st.sampled_from(VALUES),
)


@fuzz
@given(parts=st.lists(INSTRUCTIONS, max_size=40))
def test_any_instructions(parts: list[bytes]) -> None:
    check(b"\x80\x04" + b"".join(parts) + b".")


@fuzz
@given(
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 5000),
)
def test_a_good_pickle_with_bytes_changed_or_cut_off(protocol: int, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(pickle.dumps(VALUE, protocol))
    for place, byte in changes:
        data[place % len(data)] = byte
    check(bytes(data))
    check(bytes(data[: cut % len(data)]))
