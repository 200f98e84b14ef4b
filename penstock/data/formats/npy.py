"""NumPy .npy arrays of token ids: one dimension is a stream, two are sequences of equal length.

`registry.py` hands it files to read and splits to write. It must never unpickle: an array of
objects is refused by its header alone.
Source: NumPy's format specification (NEP 1), header by NumPy itself.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from penstock.data.formats.output import OutputFile
from penstock.data.formats.sequence import Facts, Layout, TokenSequence, damaged

MAGIC = b"\x93NUMPY"
_LARGEST_HEADER = 4096


class Reader:
    """One array, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Check the header against the file.

        Raises:
            DataError: other element types or dimensions, or another size than the header states.
        """
        size = path.stat().st_size
        with path.open("rb") as handle:
            shape, fortran, dtype = _header(handle, path)
            offset = handle.tell()
        if dtype.kind not in "ui" or dtype.hasobject:
            raise damaged(path, f"holds {dtype}, which are no token ids")
        if len(shape) not in (1, 2) or (fortran and len(shape) == 2):
            raise damaged(path, f"has shape {shape}, not (tokens,) or (rows, tokens) in C order")
        if min(shape) < 0 or size != offset + math.prod(shape) * dtype.itemsize:
            raise damaged(path, f"has {size:,} bytes, its header claims an array {shape}")
        full = math.prod(shape) > 0
        if not full and shape != (0,):
            raise damaged(path, "has rows without elements")
        self._rows = np.memmap(path, dtype, "r", offset, shape) if full else np.empty((0,), dtype)
        rows = shape[0] if len(shape) == 2 else 1
        width = shape[1] if len(shape) == 2 else None
        self.facts = Facts(rows, math.prod(shape), str(dtype), width)

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield the stream, or each row."""
        for row in self._rows if self._rows.ndim == 2 else [self._rows]:
            yield TokenSequence(row)


def _header(handle: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = npy_format.read_magic(handle)
        if version == (1, 0):
            return npy_format.read_array_header_1_0(handle, _LARGEST_HEADER)
        if version == (2, 0):
            return npy_format.read_array_header_2_0(handle, _LARGEST_HEADER)
    except Exception as error:  # NumPy's parser lets those of ast and tokenize through
        raise damaged(path, f"has a header that does not read ({type(error).__name__})") from None
    raise damaged(path, f"is .npy version {version}, which is not read")


class Writer:
    """SPLIT.npy: rows where all sequences have one length, else one stream."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Begin the file with its shape, which the layout states."""
        self._output = OutputFile(folder / f"{split}.npy")
        self._file = self._output.temporary.open("wb")
        self._output.opened(self._file.close)
        self._dtype = np.dtype("<u2" if layout.largest < 1 << 16 else "<i4")
        rows = layout.equal and layout.sequences > 1
        shape = (layout.sequences, layout.width) if rows else (layout.tokens,)
        npy_format.write_array_header_1_0(
            self._file,
            {"descr": self._dtype.str, "fortran_order": False, "shape": shape},
        )

    def append(self, sequence: TokenSequence) -> None:
        """Add one sequence."""
        self._file.write(np.ascontiguousarray(sequence.tokens, self._dtype).data)

    def finish(self) -> list[Path]:
        """Name the file."""
        return [self._output.finish()]

    def abandon(self) -> None:
        """Leave nothing."""
        self._output.abandon()
