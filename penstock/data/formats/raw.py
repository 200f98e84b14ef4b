"""Token streams of nanoGPT (bare uint16) and of llm.c (a header of 256 int32 before them).

`registry.py` hands them files to read and splits to write. One file is one sequence: these formats
keep neither borders nor weights. Nothing in a bare file says what it is, so that it is only ever
taken for one when nothing else fits. They must never load a stream into memory.
Source: karpathy/nanoGPT, data/*/prepare.py; karpathy/llm.c, dev/data/data_common.py.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.data.formats.output import OutputFile
from penstock.data.formats.sequence import Facts, Layout, TokenSequence, damaged

_HEADER = struct.Struct("<256i")
_KINDS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
"""Token type by magic number and version: GPT-2's vocabulary, and larger ones."""
LARGEST_UINT16 = 65535
LARGEST_GPT2 = 50304
"""No token of a bare file may reach this: GPT-2's vocabulary, padded. Bytes of other kinds do."""
_WHITE_SPACE = tuple(b"\t\n\v\f\r\x1b")
_SAMPLE_BYTES = 1 << 18


def recognises_llmc(head: bytes) -> bool:
    """Whether a file that begins so has llm.c's header."""
    return len(head) >= 8 and struct.unpack("<2i", head[:8]) in _KINDS


def may_be_bare(path: Path) -> bool:
    """Whether a file can be bare uint16 tokens: not text, and every id sampled is GPT-2's."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        return False
    with path.open("rb") as handle:
        for place in {0, size // 2, max(0, size - _SAMPLE_BYTES)}:
            handle.seek(place - place % 2)
            data = handle.read(min(_SAMPLE_BYTES, size) // 2 * 2)
            if np.frombuffer(data, "<u2").max() >= LARGEST_GPT2 or _is_text(data):
                return False
    return True


def _is_text(data: bytes) -> bool:
    """Whether bytes are UTF-8 without control characters but white space; a character cut at
    either end does not matter.
    """
    octets = np.frombuffer(data, np.uint8)
    if bool(((octets < 0x20) & ~np.isin(octets, _WHITE_SPACE)).any()):
        return False
    return "\ufffd" not in data.decode("utf-8", "replace")[3:-3]


class BareReader:
    """One file of uint16 tokens, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Map it.

        Raises:
            DataError: empty, or an odd number of bytes.
        """
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise damaged(path, f"has {size} bytes, which are no uint16 tokens")
        self._tokens = np.memmap(path, "<u2", "r")
        note = "nothing in the file says what it is: taken as bare uint16 tokens"
        self.facts = Facts(1, len(self._tokens), "uint16", notes=(note,))

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield the file."""
        yield TokenSequence(self._tokens)


class LlmcReader:
    """One file with llm.c's header, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Check the header against the file.

        Raises:
            DataError: another header, or another size than it states.
        """
        size = path.stat().st_size
        with path.open("rb") as handle:
            head = handle.read(_HEADER.size)
        if len(head) < _HEADER.size or not recognises_llmc(head):
            raise damaged(path, "has no header of llm.c")
        magic, version, count = _HEADER.unpack(head)[:3]
        dtype = _KINDS[magic, version]
        if count < 0 or size != _HEADER.size + count * dtype.itemsize:
            raise damaged(path, f"has {size:,} bytes, its header claims {count:,} tokens")
        self._tokens: NDArray[Any] = (
            np.memmap(path, dtype, "r", _HEADER.size) if count else np.empty(0, dtype)
        )
        self.facts = Facts(1, count, str(dtype))

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield the file."""
        yield TokenSequence(self._tokens)


class _StreamWriter:
    """SPLIT.bin: tokens back to back."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], header: bytes) -> None:
        self._output = OutputFile(folder / f"{split}.bin")
        self._file = self._output.temporary.open("wb")
        self._output.opened(self._file.close)
        self._dtype = dtype
        self._file.write(header)

    def append(self, sequence: TokenSequence) -> None:
        """Add tokens."""
        self._file.write(np.ascontiguousarray(sequence.tokens, self._dtype).data)

    def finish(self) -> list[Path]:
        """Name the file."""
        return [self._output.finish()]

    def abandon(self) -> None:
        """Leave nothing."""
        self._output.abandon()


class BareWriter(_StreamWriter):
    """SPLIT.bin as nanoGPT reads it."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Begin the file; nanoGPT calls validation `val`."""
        name = "val" if split == "validation" else split
        super().__init__(folder, name, np.dtype("<u2"), b"")


class LlmcWriter(_StreamWriter):
    """SPLIT.bin as llm.c reads it; uint32 where an id needs it."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Begin the file with the number of tokens, which the layout states."""
        wide = layout.largest > LARGEST_UINT16
        (kind,) = (k for k, dtype in _KINDS.items() if (dtype.itemsize == 4) == wide)
        header = _HEADER.pack(*kind, layout.tokens, *[0] * 253)
        super().__init__(folder, split, _KINDS[kind], header)
