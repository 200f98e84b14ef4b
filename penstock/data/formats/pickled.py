"""Pickled lists of token ids, as Graphcore's preprocessing leaves them, without unpickling.

`registry.py` hands it files to read and splits to write. `opcodes.py` reads the file: it knows
lists, integers, strings and NumPy arrays of integers and nothing else, imports nothing and calls
nothing a file names. A list of ids is one sequence, a list of lists or arrays several.
Source: graphcore/examples, nlp/gpt2 (a pickled list); Python's pickletools for the opcodes.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.data.formats.opcodes import (
    Items,
    MalformedPickleError,
    looks_like_pickle,
    read_opcodes,
)
from penstock.data.formats.output import OutputFile
from penstock.data.formats.pickled_arrays import Made, Refused
from penstock.data.formats.sequence import Facts, Layout, TokenSequence, damaged

_BATCH = 1 << 16
"""Integers per batch written."""

recognises = looks_like_pickle


class Reader:
    """One file; memory is eight bytes a token, since a pickled list has no parts to skip to."""

    def __init__(self, path: Path) -> None:
        """Read the whole file.

        Raises:
            DataError: damaged, or holding anything else; nothing in it is executed.
        """
        if path.stat().st_size == 0:
            raise damaged(path, "is empty")
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as m:
            self._sequences = _read_pickle(m, str(path))
        tokens = sum(len(s) for s in self._sequences)
        self.facts = Facts(len(self._sequences), tokens, "pickled integers")

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield each list."""
        for tokens in self._sequences:
            yield TokenSequence(tokens)


def _read_pickle(data: Any, where: str) -> list[NDArray[Any]]:  # noqa: ANN401 - bytes or a mapped file
    """The sequences a pickle holds.

    Raises:
        DataError: damaged, or anything but lists of integers and arrays of them.
    """
    try:
        sequences = _sequences(read_opcodes(data))
    except Refused as error:
        raise damaged(where, f"is refused: it holds {error}", "export the ids as JSON") from None
    except MalformedPickleError:
        raise damaged(where, "is a damaged or truncated pickle") from None
    # A list can stand in a pickle once and be referred to a million times.
    if sum(len(s) for s in sequences) > len(data):
        raise damaged(where, "repeats its lists: it claims more tokens than it has bytes")
    return sequences


def _sequences(value: object) -> list[NDArray[Any]]:
    """Top-level lists or arrays as sequences."""
    if isinstance(value, Made):
        rows = _made(value)
        return [rows] if rows.ndim == 1 else list(rows)
    if not isinstance(value, Items):
        raise Refused("no list")
    if not value.others:
        return [_integers(value)] if value.integers else []
    if value.integers:
        raise Refused("a list of both integers and lists")
    return [_inner(item) for item in value.others]


def _inner(item: object) -> NDArray[Any]:
    """A list or array inside the outermost list."""
    if isinstance(item, Made):
        tokens = _made(item)
    elif isinstance(item, Items) and not item.others:
        tokens = _integers(item)
    else:
        raise Refused("lists in lists in a list")
    if tokens.ndim != 1:
        raise Refused(f"an array of {tokens.ndim} dimensions in a list")
    return tokens


def _made(item: Made) -> NDArray[Any]:
    if not isinstance(item.value, np.ndarray) or item.value.ndim not in (1, 2):
        raise Refused("something that is no array of one or two dimensions")
    return item.value


def _integers(items: Items) -> NDArray[np.int64]:
    return np.frombuffer(items.integers, np.int64) if items.integers else np.empty(0, np.int64)


class Writer:
    """SPLIT.pkl: a list of lists of integers, protocol 2, written as it comes."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Begin the file; a single sequence is a list of integers itself, as Graphcore's are."""
        self._output = OutputFile(folder / f"{split}.pkl")
        self._file = self._output.temporary.open("wb")
        self._output.opened(self._file.close)
        self._nested = layout.sequences != 1
        self._file.write(b"\x80\x02" + (b"]" if self._nested else b""))

    def append(self, sequence: TokenSequence) -> None:
        """Add one list."""
        self._file.write(b"]")
        for first in range(0, len(sequence.tokens), _BATCH):
            values = sequence.tokens[first : first + _BATCH].tolist()
            # MARK, a BININT each, APPENDS
            self._file.write(b"(" + b"".join(struct.pack("<ci", b"J", v) for v in values) + b"e")
        if self._nested:
            self._file.write(b"a")

    def finish(self) -> list[Path]:
        """End the pickle and name the file."""
        self._file.write(b".")
        return [self._output.finish()]

    def abandon(self) -> None:
        """Leave nothing."""
        self._output.abandon()
