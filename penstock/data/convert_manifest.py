"""A converted Megatron folder made into a dataset that training opens.

`convert.py` calls `make_dataset` where the tokenizer is known. It must never change a token file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from penstock.data.dataset import MANIFEST, SCHEMA_VERSION, TOKENIZER
from penstock.data.formats import megatron
from penstock.data.formats.indexed import WEIGHTS_SUFFIX
from penstock.data.splits import SPLITS
from penstock.data.tokenizer import Tokenizer
from penstock.files import atomic_write, canonical_json, sha256_file

_BLOCK = 1 << 20
"""Tokens decoded at a time; a sequence can be a stream of any length."""


def make_dataset(
    folder: Path, tokenizer: Tokenizer, *, rows: bool, sequence_length: int | None, source: str
) -> list[Path]:
    """Write the tokenizer and the manifest; splits that were not converted are empty.

    `rows`: each sequence is a sample, not a piece of one stream. Returns what was written.
    """
    for name in SPLITS:
        if not (folder / f"{name}.idx").exists():
            megatron.Writer(folder / name, megatron.token_dtype(tokenizer.vocab_size)).finish()
    facts = {name: _facts(folder / name, tokenizer) for name in SPLITS}
    tokenizer.save(folder / TOKENIZER)
    pairs = [*SPLITS, *(name + WEIGHTS_SUFFIX for name in SPLITS)]
    names = [TOKENIZER, *(f"{pair}{kind}" for pair in pairs for kind in (".bin", ".idx"))]
    files = [folder / name for name in names if (folder / name).exists()]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
        },
        "packing": "single::truncate_right" if rows else "full",
        "sequence_length": sequence_length,
        "splits": facts,
        "files": {f.name: {"sha256": sha256_file(f), "bytes": f.stat().st_size} for f in files},
        "converted_from": source,
    }
    atomic_write(folder / MANIFEST, canonical_json(manifest))
    return [*files, folder / MANIFEST]


def _facts(prefix: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Counts of a split, with the text its tokens decode to."""
    reader = megatron.Reader(prefix)
    facts = {"documents": len(reader.lengths), "tokens": len(reader.tokens)}
    size = words = 0
    for text in _texts(reader, tokenizer):
        size += len(text.encode())
        words += len(text.split())
    return {**facts, "text_bytes": size, "words": words}


def _texts(reader: megatron.Reader, tokenizer: Tokenizer) -> Iterator[str]:
    """Text of each sequence, or of a stretch of it; end-of-text is no text."""
    for start, length in zip(reader.starts, reader.lengths, strict=True):
        for first in range(int(start), int(start + length), _BLOCK):
            tokens = np.asarray(reader.tokens[first : min(first + _BLOCK, int(start + length))])
            yield tokenizer.decode(tokens[~np.isin(tokens, tokenizer.frame)].tolist())
