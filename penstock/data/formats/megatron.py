"""Megatron's indexed dataset: `.bin` with tokens back to back, `.idx` with lengths and pointers.

`data/prepare.py` writes it, `data/dataset.py` reads it memory-mapped. It must never know what the
numbers mean. Source: NVIDIA Megatron-LM, megatron/core/datasets/indexed_dataset.py (layout only).
"""

import array
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.files import fsync_file, fsync_folder

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_UINT16_VOCABULARY = 65500
_LONGEST_SEQUENCE = 2**31 - 1
"""Lengths are int32."""
_BLOCK = 1 << 20
"""Sequences looked at at a time, so that checks need no memory of the index's size."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for vocabularies below 65,500, else int32, as Megatron chooses."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


class Writer:
    """Append sequences; the pair of files appears under its name only by `finish`.

    Memory grows with the number of sequences (4 bytes each), not with their tokens. A document
    longer than the format's 2³¹ - 1 tokens becomes several sequences of one document.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        """Write PREFIX.bin and PREFIX.idx."""
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._lengths = array.array("i")
        self._partial = 0
        self._continued: list[int] = []
        """Sequences that go on with the document of the sequence before."""
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = prefix.with_name(f".{prefix.name}.bin.tmp")
        self._file = self._temporary.open("wb")

    def append(self, tokens: NDArray[Any], *, ends: bool = True) -> None:
        """Add tokens to the current sequence; `ends` closes it."""
        self._file.write(np.ascontiguousarray(tokens, self._dtype).data)
        self._partial += len(tokens)
        while self._partial > _LONGEST_SEQUENCE:
            self._lengths.append(_LONGEST_SEQUENCE)
            self._continued.append(len(self._lengths))
            self._partial -= _LONGEST_SEQUENCE
        if ends:
            self._lengths.append(self._partial)
            self._partial = 0

    def append_sequences(
        self, tokens: NDArray[Any], lengths: NDArray[np.int32], *, ends: bool = True
    ) -> None:
        """Add sequences at once: their tokens back to back, and each one's length.

        The first goes on with a sequence left open before; `ends` False leaves the last one open.
        """
        closed = len(lengths) - (not ends and len(lengths) > 0)
        first = 0
        if self._partial and closed:
            first = int(lengths[0])
            self.append(tokens[:first])
            lengths = lengths[1:]
            closed -= 1
        size = int(lengths[:closed].sum(dtype=np.int64))
        self._file.write(np.ascontiguousarray(tokens[first : first + size], self._dtype).data)
        self._lengths.frombytes(np.ascontiguousarray(lengths[:closed], np.int32).tobytes())
        if closed < len(lengths):
            self.append(tokens[first + size :], ends=False)

    def finish(self) -> None:
        """Make both files durable and give them their names; an open sequence is closed."""
        if self._partial:
            self.append(np.empty(0, self._dtype))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        _write_index(
            self._prefix, self._dtype, np.frombuffer(self._lengths, np.int32), self._continued
        )
        self._temporary.replace(self._prefix.with_suffix(".bin"))
        fsync_folder(self._prefix.parent)

    def abandon(self) -> None:
        """Close and remove what was written so far."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()


def _write_index(
    prefix: Path, dtype: np.dtype[Any], lengths: NDArray[np.int32], continued: list[int]
) -> None:
    """Write PREFIX.idx: one document per sequence, but for those that continue one."""
    documents = len(lengths) + 1 - len(continued)
    temporary = prefix.with_name(f".{prefix.name}.idx.tmp")
    with temporary.open("wb") as handle:
        handle.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], len(lengths), documents))
        handle.write(lengths.data)
        position = 0
        for first in range(0, len(lengths), _BLOCK):
            sizes = lengths[first : first + _BLOCK].astype(np.int64) * dtype.itemsize
            ends = position + np.cumsum(sizes)
            handle.write((ends - sizes).data)
            position = int(ends[-1])
        for first in range(0, len(lengths) + 1, _BLOCK):
            block = np.arange(first, min(first + _BLOCK, len(lengths) + 1), dtype=np.int64)
            handle.write(np.setdiff1d(block, continued).data)
    fsync_file(temporary)
    temporary.replace(prefix.with_suffix(".idx"))


class Reader:
    """A pair of files, memory-mapped read-only, every length and offset checked on opening."""

    tokens: NDArray[Any]
    """All elements of the .bin, (N,)."""
    lengths: NDArray[np.int32]
    """Elements of each sequence, (sequences,)."""
    starts: NDArray[np.int64]
    """First element of each sequence, (sequences,)."""
    documents: NDArray[np.int64]
    """First sequence of each document, then the end of the last, (documents + 1,)."""

    def __init__(self, prefix: Path) -> None:
        """Open PREFIX.bin and PREFIX.idx.

        Raises:
            DataError: missing, truncated or contradicting files.
        """
        index, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        try:
            raw = np.memmap(index, np.uint8, "r") if index.stat().st_size else np.empty(0, np.uint8)
            size = data.stat().st_size
        except OSError as error:
            raise DataError(
                f"{error.filename} cannot be read: {error.strerror}",
                where=str(prefix),
                do="prepare the dataset again",
            ) from None
        dtype, self.lengths, pointers, self.documents = _parse_index(index, raw)
        total = _total_bytes(index, self.lengths, dtype.itemsize)
        if size != total:
            raise _damaged(data, f"has {size} bytes, its index accounts for {total}")
        _check_pointers(index, self.lengths, pointers, dtype.itemsize, size)
        _check_documents(index, self.documents, len(self.lengths))
        self.starts = pointers // dtype.itemsize
        self.tokens = (
            np.memmap(data, dtype, "r", shape=(size // dtype.itemsize,))
            if size
            else np.empty(0, dtype)
        )


def _parse_index(
    path: Path, raw: NDArray[np.uint8]
) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Dtype, lengths, byte pointers and documents of an index whose sizes have been checked."""
    if len(raw) < _HEADER.size:
        raise _damaged(path, "is shorter than its header")
    magic, version, code, sequences, documents = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise _damaged(path, "is not a Megatron index of version 1")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if len(raw) not in (expected, expected + sequences):
        raise _damaged(path, f"has {len(raw)} bytes, its header accounts for {expected}")
    at = _HEADER.size
    lengths = np.frombuffer(raw, np.int32, sequences, at)
    pointers = np.frombuffer(raw, np.int64, sequences, at + 4 * sequences)
    return (
        np.dtype(_DTYPES[code]),
        lengths,
        pointers,
        np.frombuffer(raw, np.int64, documents, at + 12 * sequences),
    )


def _total_bytes(path: Path, lengths: NDArray[np.int32], itemsize: int) -> int:
    """Bytes of all sequences together."""
    total = 0
    for first in range(0, len(lengths), _BLOCK):
        block = lengths[first : first + _BLOCK]
        if block.min() < 0:
            raise _damaged(path, "has a negative length")
        total += int(block.sum(dtype=np.int64)) * itemsize
    return total


def _check_pointers(
    path: Path, lengths: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int, size: int
) -> None:
    """Every sequence lies inside the .bin of `size` bytes, on the border of an element."""
    for first in range(0, len(lengths), _BLOCK):
        bytes_ = lengths[first : first + _BLOCK].astype(np.int64) * itemsize
        block = pointers[first : first + _BLOCK]
        # A pointer is compared by itself first: added to a length it could wrap around.
        if block.min() < 0 or block.max() > size or (block + bytes_).max() > size:
            raise _damaged(path, "points outside the .bin")
        if (block % itemsize).any():
            raise _damaged(path, "points between elements")
    in_order = all(
        (ends[:-1] == starts[1:]).all()
        for starts, ends in _blocks_of_extents(pointers, lengths, itemsize)
    )
    if not in_order:
        # Nobody writes them so, but sequences in another order would be whole all the same.
        order = np.lexsort((lengths, pointers))
        starts, sizes = pointers[order], lengths[order].astype(np.int64) * itemsize
        if (starts[:-1] + sizes[:-1] > starts[1:]).any():
            raise _damaged(path, "has sequences that lie over one another")


def _blocks_of_extents(
    pointers: NDArray[np.int64], lengths: NDArray[np.int32], itemsize: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """First byte and the byte after the last of sequences, each block with the next one's first."""
    for first in range(0, len(lengths), _BLOCK):
        starts = pointers[first : first + _BLOCK + 1]
        yield starts, starts + lengths[first : first + _BLOCK + 1].astype(np.int64) * itemsize


def _check_documents(path: Path, documents: NDArray[np.int64], sequences: int) -> None:
    """Documents are runs of sequences, one after another."""
    if not len(documents):
        return
    in_order = all(
        (np.diff(documents[first : first + _BLOCK + 1]) >= 0).all()
        for first in range(0, len(documents), _BLOCK)
    )
    if documents[0] != 0 or not in_order or documents[-1] > sequences:
        raise _damaged(path, "has documents that are no runs of sequences")


def _damaged(path: Path, how: str) -> DataError:
    return DataError(f"{path} {how}", where=str(path), do="prepare the dataset again")
