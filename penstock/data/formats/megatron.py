"""Megatron's indexed dataset: `.bin` with tokens back to back, `.idx` with lengths and pointers.

`data/prepare.py` writes it, `data/dataset.py` reads it memory-mapped. It must never know what the
numbers mean. Source: NVIDIA Megatron-LM, megatron/core/datasets/indexed_dataset.py (layout only).
"""

import os
import struct
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


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for vocabularies below 65,500, else int32, as Megatron chooses."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


class Writer:
    """Append sequences; the pair of files appears under its name only by `finish`.

    Memory grows with the number of sequences (4 bytes each), not with their tokens.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        """Write PREFIX.bin and PREFIX.idx."""
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._lengths: list[NDArray[np.int32]] = []
        self._partial: list[int] = [0]
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = prefix.with_name(f".{prefix.name}.bin.tmp")
        self._file = self._temporary.open("wb")

    def append(self, tokens: NDArray[Any], *, ends: bool = True) -> None:
        """Add tokens to the current sequence; `ends` closes it."""
        self._file.write(np.ascontiguousarray(tokens, self._dtype).tobytes())
        self._partial[0] += len(tokens)
        if ends:
            self._lengths.append(np.array(self._partial, np.int32))
            self._partial = [0]

    def append_sequences(self, tokens: NDArray[Any], lengths: NDArray[np.int32]) -> None:
        """Add whole sequences at once: their tokens back to back, and each one's length."""
        self._file.write(np.ascontiguousarray(tokens, self._dtype).tobytes())
        self._lengths.append(np.asarray(lengths, np.int32))

    def finish(self) -> None:
        """Make both files durable and give them their names."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int32)])
        _write_index(self._prefix, self._dtype, lengths)
        self._temporary.replace(self._prefix.with_suffix(".bin"))
        fsync_folder(self._prefix.parent)

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
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def _write_index(prefix: Path, dtype: np.dtype[Any], lengths: NDArray[np.int32]) -> None:
    """Write PREFIX.idx: one document per sequence."""
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1].astype(np.int64) * dtype.itemsize, out=pointers[1:])
    documents = np.arange(len(lengths) + 1, dtype=np.int64)
    temporary = prefix.with_name(f".{prefix.name}.idx.tmp")
    with temporary.open("wb") as handle:
        handle.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], len(lengths), len(documents)))
        for array in (lengths, pointers, documents):
            handle.write(array.tobytes())
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

    def __init__(self, prefix: Path) -> None:
        """Open PREFIX.bin and PREFIX.idx.

        Raises:
            DataError: missing, truncated or contradicting files.
        """
        index, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        try:
            raw = index.read_bytes()
            size = data.stat().st_size
        except OSError as error:
            raise DataError(
                f"{error.filename} cannot be read: {error.strerror}",
                where=str(prefix),
                do="prepare the dataset again",
            ) from None
        dtype, self.lengths, pointers = _parse_index(index, raw)
        total = int(self.lengths.sum(dtype=np.int64)) * dtype.itemsize
        if size != total:
            raise _damaged(data, f"has {size} bytes, its index accounts for {total}")
        ends = pointers + self.lengths.astype(np.int64) * dtype.itemsize
        if len(pointers) and (pointers.min() < 0 or ends.max() > size):
            raise _damaged(index, "points outside the .bin")
        if (pointers % dtype.itemsize).any():
            raise _damaged(index, "points between elements")
        self.starts = pointers // dtype.itemsize
        self.tokens = (
            np.memmap(data, dtype, "r", shape=(size // dtype.itemsize,))
            if size
            else np.empty(0, dtype)
        )


def _parse_index(
    path: Path, raw: bytes
) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64]]:
    """Dtype, lengths and byte pointers of an index whose sizes have been checked."""
    if len(raw) < _HEADER.size:
        raise _damaged(path, "is shorter than its header")
    magic, version, code, sequences, documents = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise _damaged(path, "is not a Megatron index of version 1")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if len(raw) not in (expected, expected + sequences):
        raise _damaged(path, f"has {len(raw)} bytes, its header accounts for {expected}")
    lengths = np.frombuffer(raw, np.int32, sequences, _HEADER.size)
    pointers = np.frombuffer(raw, np.int64, sequences, _HEADER.size + 4 * sequences)
    if len(lengths) and lengths.min() < 0:
        raise _damaged(path, "has a negative length")
    return np.dtype(_DTYPES[code]), lengths, pointers


def _damaged(path: Path, how: str) -> DataError:
    return DataError(f"{path} {how}", where=str(path), do="prepare the dataset again")
