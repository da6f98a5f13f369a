"""Arrays and built-ins out of a pickle, and nothing else.

A pickle is a program: it may call any function that it names. Here it can name a handful, and none of these is what it
thinks it is: where NumPy's own would build an array or a type out of whatever they are given, stand-ins only take note.
What they noted is checked and made into arrays afterwards.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LARGEST = 64 << 20
"""Bytes of a pickle: one item's vector, and what is known of it."""
_DEEPEST = 20
_LENGTHS = {ord(opcode.code): opcode.arg.n if opcode.arg else 0 for opcode in pickletools.opcodes}
"""Bytes behind each instruction; below 0: its argument says itself how long it is (see `pickletools`)."""
_LINE = -1
_SIZES = {-2: 1, -3: 4, -4: 4, -5: 8}
"""How many bytes say so."""
_TWO_LINES = b"ci"
_PUT, _LONG_PUT, _STOP = ord("p"), ord("r"), ord(".")
_KINDS = "biufSU"


class Refused(Exception):
    """The pickle holds something else, or is damaged; the text says what."""


def load(data: bytes) -> Any:
    """What a pickle holds: None, bool, int, float, str, bytes, list, tuple, dict, set, NumPy arrays and scalars of
    numbers and texts. Raises Refused."""
    try:
        _check_sizes(data)
        return _plain(_Unpickler(io.BytesIO(data), encoding="latin1").load(), {}, 0)
    except Refused:
        raise
    except MemoryError:
        raise Refused("it asks for more memory than there is") from None
    # A damaged pickle makes the machine that reads it stumble in any way.
    except Exception as error:  # noqa: BLE001
        words = " ".join(str(error).split())[:100]
        raise Refused(f"it is no pickle, or damaged: {type(error).__name__}: {words}") from None


def _check_sizes(data: bytes) -> None:
    """Raise Refused where an instruction asks for more than there is: Python would set aside memory for it.

    That is a length beyond the end, and a high number for what was made, up to which a list of all numbers is filled.
    """
    at, end = 0, len(data)
    while at < end:
        code = data[at]
        length = _LENGTHS.get(code)
        if length is None:
            break
        begin = at = at + 1
        if length == _LINE:
            for _ in range(2 if code in _TWO_LINES else 1):
                at = data.find(b"\n", at) + 1 or end + 1
        elif length < 0:
            at += _SIZES[length] + int.from_bytes(data[at : at + _SIZES[length]], "little")
        else:
            at += length
        if code == _LONG_PUT and int.from_bytes(data[begin:at], "little") > end:
            break
        if code == _PUT and not (data[begin : at - 1].isdigit() and int(data[begin : at - 1][:20]) <= end):
            break
        if code == _STOP:
            return
    raise Refused("it is no pickle, or damaged")


class _Array:
    """An array or a scalar as the pickle tells it."""

    def __init__(self) -> None:
        self.state: tuple[Any, ...] | None = None

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise Refused("an array in it is damaged")
        _, shape, dtype, fortran, data = state
        self.state = (shape, dtype, fortran, data)


class _Dtype:
    """A type of values as the pickle tells it: `f4`, and its byte order, which comes as the state."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.order: Literal["<", ">", "|"] = "|"

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", ">", "|", "=")):
            raise Refused("the type of an array in it is damaged")
        if any(part is not None for part in state[2:5]):
            raise Refused("an array in it has fields")
        self.order = "<" if state[1] == "=" else state[1]

    def real(self) -> np.dtype[Any]:
        try:
            dtype = np.dtype(self.word)
        except (TypeError, ValueError, SyntaxError):
            raise Refused(f"an array in it is of an unknown type, '{self.word[:20]}'") from None
        if dtype.hasobject:
            raise Refused("an array in it holds Python objects")
        if dtype.kind not in _KINDS or not dtype.itemsize:
            raise Refused(f"an array in it is of type {dtype}, not of numbers or texts")
        return dtype.newbyteorder(self.order) if self.order != "|" else dtype


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _dtype(word: Any, *_: Any) -> _Dtype:
    if not isinstance(word, str):
        raise Refused("the type of an array in it is damaged")
    return _Dtype(word)


def _scalar(dtype: Any, data: Any = None) -> _Array:
    array = _Array()
    array.state = ((), dtype, False, data)
    return array


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array()
    array.state = (shape, dtype, order == "F", data)
    return array


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    """How the oldest pickles write bytes."""
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise Refused("it holds bytes in a form that is not known")
    return text.encode("latin1")


def _bytes(*values: Any) -> bytes:
    if values:
        raise Refused("it holds bytes in a form that is not known")
    return b""


class _StandIn:
    """A function to a pickle, which could set attributes of a plain one."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *values: Any) -> Any:
        return self._function(*values)

    def __setstate__(self, _state: Any) -> None:
        raise Refused("it changes what it is read with")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _StandIn(_dtype),
    ("_codecs", "encode"): _StandIn(_encode),
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _StandIn(_reconstruct)
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _StandIn(_scalar)
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _StandIn(_frombuffer)
for _module in ("builtins", "__builtin__"):
    _ALLOWED[_module, "bytes"] = _StandIn(_bytes)
    _ALLOWED[_module, "set"] = _StandIn(set)
    _ALLOWED[_module, "frozenset"] = _StandIn(frozenset)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for what the pickle names. Raises Refused."""
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise Refused(f"it holds {module[:60]}.{name[:60]}, which is neither an array nor built in") from None

    def persistent_load(self, _pid: Any) -> Any:
        raise Refused("it holds a reference to something outside of it")


def _plain(value: Any, made: dict[int, Any], depth: int) -> Any:
    """The value with real arrays in it. What the pickle shares is made once; what contains itself is refused."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if depth > _DEEPEST:
        raise Refused("it is nested too deeply")
    if id(value) in made:
        return made[id(value)]
    result: Any
    if isinstance(value, _Array):
        result = _real(value)
    elif isinstance(value, dict):
        result = {_key(key, made, depth): _plain(item, made, depth + 1) for key, item in value.items()}
    elif isinstance(value, list | tuple | set | frozenset):
        result = type(value)(_plain(item, made, depth + 1) for item in value)
    else:
        raise Refused(f"it holds a {type(value).__name__.strip('_')} that belongs to no array")
    made[id(value)] = result
    return result


def _key(key: Any, made: dict[int, Any], depth: int) -> Any:
    plain = _plain(key, made, depth + 1)
    if isinstance(plain, np.ndarray | dict | list | set):
        raise Refused("a key in it is an array")
    return plain


def _real(array: _Array) -> Any:
    if array.state is None:
        raise Refused("an array in it is damaged")
    shape, dtype, fortran, data = array.state
    if not isinstance(dtype, _Dtype):
        raise Refused("the type of an array in it is damaged")
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise Refused("the shape of an array in it is damaged")
    real = dtype.real()
    if isinstance(data, str):  # of Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray) or len(data) != math.prod(shape) * real.itemsize:
        raise Refused("an array in it is damaged: its bytes do not fit its shape")
    values: NDArray[Any] = np.frombuffer(data, dtype=real)
    values = values.reshape(shape, order="F" if fortran else "C")
    return values[()] if shape == () else values
