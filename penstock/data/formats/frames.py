"""Messages between this process and the one that reads risky files: a line of JSON, then arrays.

`isolation.py` and `isolated_child.py` speak it. It must never carry anything but numbers and
text: what arrives is data, also when the other side has been taken over by a crafted file.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from penstock.data.formats.sequence import LARGEST_BYTES, TokenSequence

_LARGEST_HEADER = 1 << 20
_LARGEST_ARRAYS = 4 * LARGEST_BYTES
_DTYPES = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)) | {"f4"}


def write_message(
    stream: BinaryIO, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Send one message."""
    listed = [[name, a.dtype.str[1:], len(a)] for name, a in (arrays or {}).items()]
    stream.write(json.dumps({**header, "arrays": listed}).encode() + b"\n")
    for values in (arrays or {}).values():
        stream.write(np.ascontiguousarray(values).data)
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Receive one message.

    Raises:
        EOFError: the other side has ended, or does not speak so.
    """
    line = stream.readline(_LARGEST_HEADER)
    if not line.endswith(b"\n"):
        raise EOFError
    try:
        header = json.loads(line)
        listed = [(str(name), str(kind), int(count)) for name, kind, count in header["arrays"]]
    except (ValueError, TypeError, KeyError):
        raise EOFError from None
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind, count in listed:
        if kind not in _DTYPES or not 0 <= count * int(kind[1:]) <= _LARGEST_ARRAYS:
            raise EOFError
        data = stream.read(count * int(kind[1:]))
        if len(data) != count * int(kind[1:]):
            raise EOFError
        arrays[name] = np.frombuffer(data, kind)
    return header, arrays


def pack(sequences: Sequence[TokenSequence]) -> dict[str, NDArray[Any]]:
    """Sequences back to back."""
    arrays = {
        "lengths": np.array([len(s.tokens) for s in sequences], np.int64),
        "tokens": np.concatenate([s.tokens for s in sequences]),
    }
    if any(s.weights is not None for s in sequences):
        arrays["weights"] = np.concatenate([s.loss_weights() for s in sequences])
        arrays["weighted"] = np.array([s.weights is not None for s in sequences], np.uint8)
    if all(s.roles is not None for s in sequences):
        arrays["roles"] = np.concatenate([s.roles for s in sequences if s.roles is not None])
    if all(s.categories is not None for s in sequences):
        numbers = [s.categories for s in sequences if s.categories is not None]
        arrays["categories"] = np.concatenate(numbers)
    return arrays


def unpack(arrays: Mapping[str, NDArray[Any]]) -> list[TokenSequence]:
    """What `pack` packed.

    Raises:
        EOFError: arrays that do not fit together.
    """
    lengths, tokens = arrays["lengths"], arrays["tokens"]
    weights, roles = arrays.get("weights"), arrays.get("roles")
    categories = arrays.get("categories")
    parts = [a for a in (weights, roles, categories) if a is not None]
    if (lengths < 0).any() or any(len(a) != lengths.sum() for a in (tokens, *parts)):
        raise EOFError
    ends = np.cumsum(lengths)
    found: list[TokenSequence] = []
    for row, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
        part = slice(int(start), int(end))
        weighted = weights is not None and bool(arrays["weighted"][row])
        found.append(
            TokenSequence(
                tokens[part],
                weights[part] if weights is not None and weighted else None,
                None if roles is None else roles[part],
                None if categories is None else categories[part],
            )
        )
    return found
