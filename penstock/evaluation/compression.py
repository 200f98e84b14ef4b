"""What general-purpose compressors make of the same text: a yardstick a reader understands.

`api.evaluate` calls `compressor_bits`. It must never know about models.
"""

import bz2
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

from numpy.typing import NDArray

from penstock.console import get_console
from penstock.data.dataset import Split, read_documents
from penstock.data.tokenizer import Tokenizer

_PIECE_TOKENS = 1 << 14
"""Tokens decoded at once."""
_CHARACTER_TOKENS = 64
"""Most further tokens tried to end a piece on a whole character; one takes 4 bytes at most, but
the text itself may hold a row of U+FFFD, which is how half a character looks."""


class _Compressor(Protocol):
    """What the standard library's compressors have in common."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def compressor_bits(split: Split, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of `gzip -9`, `bzip2 -9` and `xz -9` on the split's text in one stream.

    The text is decoded from the tokens, which byte-level tokenizers allow without loss. Memory
    does not grow with the split, nor with a document.
    """
    compressors: dict[str, _Compressor] = {
        "gzip": zlib.compressobj(9, zlib.DEFLATED, 31),
        "bzip2": bz2.BZ2Compressor(9),
        "xz": lzma.LZMACompressor(preset=9),
    }
    sizes = dict.fromkeys(compressors, 0)
    total = 0
    with get_console().progress(f"compressing {split.name}", split.token_count) as progress:
        for document in read_documents(split):
            for text in _pieces(_content(document, tokenizer), tokenizer):
                total += len(text)
                for name, compressor in compressors.items():
                    sizes[name] += len(compressor.compress(text))
            progress.advance(len(document))
    for name, compressor in compressors.items():
        sizes[name] += len(compressor.flush())
    return {name: 8 * size / max(1, total) for name, size in sizes.items()}


def _content(document: NDArray[Any], tokenizer: Tokenizer) -> NDArray[Any]:
    """A document without the tokens that begin and end it."""
    first = int(len(document) > 0 and document[0] == tokenizer.begin)
    ends = len(document) > first and document[-1] == tokenizer.end_of_text
    return document[first : len(document) - int(ends)]


def _pieces(document: NDArray[Any], tokenizer: Tokenizer) -> Iterator[bytes]:
    """A document's text in UTF-8, some tokens at a time, cut between characters."""
    start = 0
    while start < len(document):
        end = min(start + _PIECE_TOKENS, len(document))
        text = tokenizer.decode(document[start:end].tolist())
        limit = min(end + _CHARACTER_TOKENS, len(document))
        while text.endswith("\ufffd") and end < limit:
            end += 1  # the character may go on in the next token
            text = tokenizer.decode(document[start:end].tolist())
        yield text.encode()
        start = end
