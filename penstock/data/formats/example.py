"""`tf.train.Example` messages with lists of integers and floats, without TensorFlow.

`tfrecord.py` reads and writes them. Every length is checked before it is used.
Source: protobuf's wire format (protobuf.dev/programming-guides/encoding) and TensorFlow's
core/example/{example,feature}.proto, by field numbers.
"""

import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FEATURES = 1  # in Example
_ENTRY, _KEY, _VALUE = 1, 1, 2  # in Features, and in each entry of its map
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3  # in Feature
_ITEM = 1  # in each list
_LONGEST_VARINT = 10
_MOST_FEATURES = 1000


class MalformedError(ValueError):
    """The bytes are no such message; the message says how."""


def parse_example(data: bytes) -> dict[str, NDArray[Any]]:
    """Integer (int64) and float (float32) lists by name; lists of bytes are passed over.

    Raises:
        MalformedError: anything that is no Example.
    """
    found: dict[str, NDArray[Any]] = {}
    for features in _messages(memoryview(data), _FEATURES):
        for entry in _messages(features, _ENTRY):
            name = values = None
            # What stands several times counts as it stands last, and takes no memory before.
            for key in _messages(entry, _KEY):
                name = key
            for feature in _messages(entry, _VALUE):
                values = _list_of(feature)
            if name is not None and values is not None:
                found[bytes(name).decode("utf-8", "replace")] = values
            if len(found) > _MOST_FEATURES:
                raise MalformedError(f"has more than {_MOST_FEATURES:,} lists")
    return found


def make_example(lists: Mapping[str, NDArray[Any]]) -> bytes:
    """An Example with one int64 list per integer array and one float list per float array."""
    entries: list[bytes] = []
    for name, values in sorted(lists.items()):
        if values.dtype.kind == "f":
            feature = _field(_FLOAT_LIST, _field(_ITEM, values.astype("<f4").tobytes()))
        else:
            feature = _field(_INT64_LIST, _field(_ITEM, encode_varints(values)))
        entry = _field(_KEY, name.encode()) + _field(_VALUE, feature)
        entries.append(_field(_ENTRY, entry))
    return _field(_FEATURES, b"".join(entries))


def encode_varints(values: NDArray[Any]) -> bytes:
    """Integers from 0 to 2³¹ - 1, seven bits a byte, lowest first."""
    wide = np.asarray(values, np.uint64)
    shifts = np.arange(5, dtype=np.uint64) * np.uint64(7)
    groups = wide[:, None] >> shifts
    used = (groups > 0) | (shifts == 0)
    followed = np.concatenate([used[:, 1:], np.zeros((len(wide), 1), np.bool_)], axis=1)
    octets = (groups & np.uint64(0x7F)).astype(np.uint8) | (followed.astype(np.uint8) << 7)
    return octets[used].tobytes()


def decode_varints(data: memoryview) -> NDArray[np.int64]:
    """The integers of a packed list.

    Raises:
        MalformedError: one that does not end, or is longer than ten bytes.
    """
    octets = np.frombuffer(data, np.uint8)
    if len(octets) == 0:
        return np.empty(0, np.int64)
    ends = np.flatnonzero(octets < 0x80)
    if len(ends) == 0 or ends[-1] != len(octets) - 1:
        raise MalformedError("has an integer that does not end")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    longest = int(lengths.max())
    if longest > _LONGEST_VARINT:
        raise MalformedError("has an integer of more than ten bytes")
    values = np.zeros(len(ends), np.uint64)
    for place in range(longest):
        there = lengths > place
        part = octets[starts[there] + place].astype(np.uint64) & np.uint64(0x7F)
        values[there] |= part << np.uint64(7 * place)
    return values.view(np.int64)


def _list_of(feature: memoryview) -> NDArray[Any] | None:
    """The integer or float list of a Feature, its parts joined; None for bytes."""
    found: NDArray[Any] | None = None
    for number, content in _fields(feature):
        if isinstance(content, int):
            continue
        if number == _INT64_LIST:
            integers = array.array("Q")
            for item in _items(content):
                if isinstance(item, int):
                    integers.append(item)
                else:
                    integers.frombytes(decode_varints(item).tobytes())
            found = np.array(integers, np.uint64).view(np.int64)
        elif number == _FLOAT_LIST:
            floats = bytearray()
            for item in _items(content):
                floats += _floats(item)
            found = np.frombuffer(bytes(floats), "<f4")
    return found


def _items(content: memoryview) -> Iterator[int | memoryview]:
    return (value for number, value in _fields(content) if number == _ITEM)


def _floats(item: int | memoryview) -> memoryview:
    if isinstance(item, int) or len(item) % 4:
        raise MalformedError("has floats of another length")
    return item


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """Every length-delimited field of one number."""
    for number, value in _fields(data):
        if number == wanted:
            if isinstance(value, int):
                raise MalformedError("has a number where a message belongs")
            yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field; fixed-width values as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise MalformedError(f"has a field of kind {kind}")
        if number == 0 or length > len(data) - at:
            raise MalformedError("has a field that ends outside it")
        yield number, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """One integer and the place behind it."""
    value = 0
    for place in range(_LONGEST_VARINT):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << (7 * place)
        at += 1
        if data[at - 1] < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise MalformedError("has an integer that does not end")


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return bytes([number << 3 | _BYTES]) + encode_varints(np.array([len(content)])) + content
