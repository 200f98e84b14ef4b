"""Shards to one split of a dataset: their sequences joined in order, or packed into rows.

`data/prepare.py` calls `merge_shards`. It must never read text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.config.data import DataSection
from penstock.data.formats.megatron import Reader, Writer, token_dtype
from penstock.data.packing import Packing, fit, pack_rows, parse_packing
from penstock.data.tokenize import Shard
from penstock.data.tokenizer import Tokenizer


def merge_shards(
    prefix: Path,
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    data: DataSection,
    facts: dict[str, int],
) -> None:
    """Write the split that `prefix` names from all shards.

    `facts` has the counts of the text read; it gets the tokens written, and loses what packing
    has dropped or cut off.
    """
    packing = parse_packing(data.packing)
    parts = ((Reader(Path(s.folder) / prefix.name), s.open_split != prefix.name) for s in shards)
    facts["tokens"] = 0
    with Writer(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        if packing.kind == "full":
            for reader, ends in parts:
                writer.append_sequences(reader.tokens, reader.lengths, ends=ends)
                facts["tokens"] += len(reader.tokens)
        else:
            limit = (data.sequence_length or 1) + 1
            fitted = _fitted(_documents(parts), packing, limit, tokenizer, facts)
            for row in pack_rows(fitted, packing.kind, limit):
                writer.append(row)
                facts["tokens"] += len(row)


def _documents(parts: Iterator[tuple[Reader, bool]]) -> Iterator[NDArray[Any]]:
    """Tokens of each document; one that goes on in the next shard is put together."""
    begun: list[NDArray[Any]] = []
    for reader, ends in parts:
        last = len(reader.lengths) - 1
        for index, (start, length) in enumerate(zip(reader.starts, reader.lengths, strict=True)):
            begun.append(reader.tokens[start : start + length])
            if ends or index < last:
                yield np.concatenate(begun) if len(begun) > 1 else begun[0]
                begun = []


def _fitted(
    documents: Iterator[NDArray[Any]],
    packing: Packing,
    limit: int,
    tokenizer: Tokenizer,
    facts: dict[str, int],
) -> Iterator[NDArray[Any]]:
    """Documents of at most `limit` tokens, with the counts of what was lost taken off."""
    for document in documents:
        kept = fit(document, packing.overflow, limit)
        if kept is not document:
            _count(facts, document, tokenizer, -1)
            if kept is not None:
                _count(facts, kept, tokenizer, 1)
        if kept is not None:
            yield kept


def _count(facts: dict[str, int], document: NDArray[Any], tokenizer: Tokenizer, sign: int) -> None:
    text = tokenizer.decode(document[document != tokenizer.end_of_text].tolist())
    facts["documents"] += sign
    facts["text_bytes"] += sign * len(text.encode())
    facts["words"] += sign * len(text.split())
