"""What a pickled NumPy array of integers asks to be called, done here by hand.

`opcodes.py` comes here at every name and call of a pickle. Each name is looked up in one closed
table when it is met; nothing is imported. Source: NumPy's ndarray.__reduce__ and
__reduce_ex__ (protocol 5), _codecs.encode for bytes in protocols below 3.
"""

import math
import re
from typing import Any

import numpy as np

_NDARRAY, _DTYPE = ("numpy", "ndarray"), ("numpy", "dtype")
_RECONSTRUCT = [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
_SCALAR = [(f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")]
_FROM_BUFFER = [(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")]
_ENCODE = [("_codecs", "encode")]
_BYTES = [("builtins", "bytes"), ("__builtin__", "bytes")]
_KNOWN = {_NDARRAY, _DTYPE, *_RECONSTRUCT, *_SCALAR, *_FROM_BUFFER, *_ENCODE, *_BYTES}
_INTEGER_TYPE = re.compile(r"[<>|=]?[iu][1248]")


class Refused(ValueError):  # noqa: N818 - it names what was met, and never leaves the package
    """Something no list or array of integers needs; the message names it."""


class Name:
    """A name a pickle may call: one of a few, all NumPy's or of bytes."""

    def __init__(self, module: str, name: str) -> None:
        """Refuse every other name when it is met, long before anything could be called."""
        self.path = (module, name)
        if self.path not in _KNOWN:
            raise Refused(f"{module}.{name}, which it would call")


class Made:
    """A type or array on its way: pickle first makes it, then gives it its state."""

    def __init__(self, value: Any = None) -> None:  # noqa: ANN401 - a dtype, later an array
        """None: an array without state yet."""
        self.value = value

    def build(self, state: object) -> None:
        """Give a type its byte order, or an array its content."""
        if not isinstance(state, tuple):
            raise Refused("an array of unknown state")
        if isinstance(self.value, np.dtype):
            if len(state) < 2 or state[1] not in ("<", ">", "|", "="):
                raise Refused("a type of unknown byte order")
            self.value = self.value.newbyteorder(state[1])
            return
        if len(state) != 5 or self.value is not None:
            raise Refused("an array of unknown state")
        _, shape, kind, fortran, data = state
        self.value = _array(data, kind, shape, "F" if fortran else "C")


def reduce(function: object, arguments: object) -> object:
    """What calling one of the known names would give.

    Raises:
        Refused: any other call, or arguments an array of integers never has.
    """
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise Refused("a call of something without a name")
    path, count = function.path, len(arguments)
    if path == _DTYPE and count:
        return Made(_integer_type(arguments[0]))
    if path in _RECONSTRUCT:
        return Made()
    if path in _SCALAR and count == 2:
        return int(_array(arguments[1], arguments[0], (1,), "C")[0])
    if path in _FROM_BUFFER and count == 4:
        return Made(_array(*arguments))
    if path in _ENCODE and count == 2 and arguments[1] == "latin1":
        return str(arguments[0]).encode("latin-1")
    if path in _BYTES and not count:
        return b""
    raise Refused(f"a call of {'.'.join(path)} no array makes")


def _integer_type(code: object) -> np.dtype[Any]:
    if not isinstance(code, str) or not _INTEGER_TYPE.fullmatch(code):
        raise Refused(f"an array of {str(code)[:40]}, not of integers")
    return np.dtype(code)


def _array(data: object, kind: object, shape: object, order: object) -> np.ndarray:
    """Bytes as an array, when type, shape and length agree."""
    if not isinstance(data, bytes) or not isinstance(kind, Made) or order not in ("C", "F"):
        raise Refused("an array of unknown content")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise Refused("an array of unknown shape")
    if not isinstance(kind.value, np.dtype) or len(shape) > 2:
        raise Refused(f"an array of {len(shape)} dimensions")
    if math.prod(shape) * kind.value.itemsize != len(data):
        raise Refused(f"an array {shape} of {len(data)} bytes")
    return np.frombuffer(data, kind.value).reshape(shape, order="F" if order == "F" else "C")
