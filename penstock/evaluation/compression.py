"""What general-purpose compressors make of the same text: a yardstick a reader understands.

`api.evaluate` calls `compressor_bits`. It must never know about models.
"""

import bz2
import lzma
import zlib
from typing import Protocol

from penstock.data.dataset import Split, read_documents
from penstock.data.tokenizer import Tokenizer


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def compressor_bits(split: Split, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of `gzip -9`, `bzip2 -9` and `xz -9` on the split's text in one stream.

    The text is decoded from the tokens, which byte-level tokenizers allow without loss.
    """
    compressors: dict[str, _Compressor] = {
        "gzip": zlib.compressobj(9, zlib.DEFLATED, 31),
        "bzip2": bz2.BZ2Compressor(9),
        "xz": lzma.LZMACompressor(preset=9),
    }
    sizes = dict.fromkeys(compressors, 0)
    total = 0
    for document in read_documents(split):
        ids = document[:-1] if len(document) and document[-1] == split.end_of_text else document
        text = tokenizer.decode(ids.tolist()).encode()
        total += len(text)
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.compress(text))
    for name, compressor in compressors.items():
        sizes[name] += len(compressor.flush())
    return {name: 8 * size / max(1, total) for name, size in sizes.items()}
