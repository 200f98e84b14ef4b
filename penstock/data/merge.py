"""Shards to one split of a dataset: their documents joined in order, or packed into rows.

`data/prepare.py` calls `merge_split`. It must never read text.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.data.articles import ArticleRules, pack_articles
from penstock.data.documents import Documents
from penstock.data.formats.megatron import Reader, Writer, token_dtype
from penstock.data.formats.sequence import PROMPT, Facts, Origin, TokenSequence, weights_or_none
from penstock.data.packing import Packing
from penstock.data.tokenize import CATEGORIES, ROLES, Shard
from penstock.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Rows:
    """What becomes of a split's documents."""

    packing: Packing | None
    """None: they are kept as they are, one after another."""
    width: int
    """Tokens of a row."""
    overlap: int
    """Tokens with which a row that full packing has filled begins the next one."""
    rules: ArticleRules
    prompted: bool
    """Whether some document has a prompt."""
    with_roles: bool
    """Whether roles are written."""
    shuffle: bool
    seed: int
    categorized: bool = False
    """Whether tokens have categories."""
    left_out: NDArray[np.bool_] | None = None
    """Which documents are not written, by number."""


def merge_split(
    prefix: Path, shards: Sequence[Shard], rows: Rows, tokenizer: Tokenizer, facts: dict[str, int]
) -> Origin | None:
    """Write PREFIX.bin/.idx from all shards, and PREFIX_roles where roles are wanted.

    `facts` has the counts of the text read; it gets the tokens written, and loses what packing
    has dropped or cut off. Returns what was packed, None where documents are only joined.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    if rows.packing is None and not (rows.with_roles or rows.shuffle or rows.left_out is not None):
        facts["tokens"] = _join(prefix, shards, dtype)
        return None
    documents = Documents(shards, prefix.name, prompted=rows.prompted, categorized=rows.categorized)
    kept = _kept(documents, rows, tokenizer, facts)
    packed = _Packed(facts["documents"])
    ordered = _ordered(documents, kept, rows, prefix.name)
    sequences = _counted(ordered, rows, tokenizer, facts, packed)
    if rows.packing is not None:
        sequences = pack_articles(sequences, rows.packing, rows.width, rows.rules, rows.overlap)
    facts["tokens"] = 0
    roles_prefix = prefix.with_name(prefix.name + ROLES)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(Writer(prefix, dtype))
        roles = stack.enter_context(Writer(roles_prefix, np.dtype(np.uint8)))
        kinds = prefix.with_name(prefix.name + CATEGORIES)
        categories = (
            stack.enter_context(Writer(kinds, np.dtype(np.int32))) if rows.categorized else None
        )
        for sequence in sequences:
            writer.append(sequence.tokens)
            roles.append(np.asarray(sequence.roles))
            if categories is not None:
                categories.append(np.asarray(sequence.categories))
            facts["tokens"] += len(sequence.tokens)
    if not rows.with_roles:
        for kind in (".bin", ".idx"):
            roles_prefix.with_suffix(kind).unlink()
    return Origin(packed.documents, packed.tokens, packed.dropped)


@dataclasses.dataclass
class _Packed:
    """Counts of what goes into packing, while it goes."""

    documents: int
    tokens: int = 0
    dropped: int = 0


def _join(prefix: Path, shards: Sequence[Shard], dtype: np.dtype[np.generic]) -> int:
    """All shards' sequences one after another, copied in blocks; returns their tokens."""
    total = 0
    with Writer(prefix, dtype) as writer:
        for shard in shards:
            reader = Reader(Path(shard.folder) / prefix.name)
            ends = shard.open_split != prefix.name
            writer.append_sequences(reader.tokens, reader.lengths, ends=ends)
            total += len(reader.tokens)
    return total


def _kept(
    documents: Documents, rows: Rows, tokenizer: Tokenizer, facts: dict[str, int]
) -> NDArray[np.int64]:
    """Numbers of the documents that are written; the counts lose the others."""
    if rows.left_out is None:
        return np.arange(len(documents))
    for number in np.flatnonzero(rows.left_out).tolist():
        _count(facts, documents[number].tokens, tokenizer, -1)
    return np.flatnonzero(~rows.left_out)


def _ordered(
    documents: Documents, kept: NDArray[np.int64], rows: Rows, split: str
) -> Iterator[TokenSequence]:
    """Every document that is kept once, in their order or shuffled by the seed."""
    if rows.shuffle:
        kept = np.random.default_rng([rows.seed, *split.encode()]).permutation(kept)
    for number in kept.tolist():
        yield documents[number]


def _counted(
    documents: Iterator[TokenSequence],
    rows: Rows,
    tokenizer: Tokenizer,
    facts: dict[str, int],
    packed: _Packed,
) -> Iterator[TokenSequence]:
    """The documents, with the counts of what packing will cut off or drop taken off."""
    packing = rows.packing
    for document in documents:
        length = len(document.tokens)
        packed.tokens += length
        if packing is not None and packing.kind != "full" and length > rows.width:
            _count(facts, document.tokens, tokenizer, -1)
            packed.dropped += length
            if packing.overflow != "drop":
                packed.dropped -= rows.width
                left = packing.overflow == "truncate_left"
                part = slice(-rows.width, None) if left else slice(rows.width)
                _count(facts, document.tokens[part], tokenizer, 1)
        yield document


def _count(
    facts: dict[str, int], tokens: NDArray[np.generic], tokenizer: Tokenizer, sign: int
) -> None:
    text = tokenizer.decode(tokens[~np.isin(tokens, tokenizer.frame)].tolist())
    facts["documents"] += sign
    facts["text_bytes"] += sign * len(text.encode())
    facts["words"] += sign * len(text.split())


class MergedReader:
    """A merged split as token sequences, weights from roles, for writers of formats."""

    def __init__(self, prefix: Path, prompt_weight: float, *, with_roles: bool) -> None:
        """`with_roles`: hand on roles too, which only some formats hold."""
        self._tokens = Reader(prefix)
        roles = prefix.with_name(prefix.name + ROLES)
        self._roles = Reader(roles) if roles.with_suffix(".idx").exists() else None
        categories = prefix.with_name(prefix.name + CATEGORIES)
        self._categories = Reader(categories) if categories.with_suffix(".idx").exists() else None
        self._prompt_weight, self._with_roles = prompt_weight, with_roles
        self.facts = Facts(len(self._tokens.lengths), len(self._tokens.tokens), "int32")

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield each row or document."""
        inner = self._tokens
        for start, length in zip(inner.starts.tolist(), inner.lengths.tolist(), strict=True):
            part = slice(start, start + length)
            if self._roles is None:
                yield TokenSequence(inner.tokens[part])
                continue
            roles = self._roles.tokens[part]
            weights = np.where(roles == PROMPT, np.float32(self._prompt_weight), np.float32(1))
            yield TokenSequence(
                inner.tokens[part],
                weights_or_none(weights),
                roles if self._with_roles else None,
                None if self._categories is None else self._categories.tokens[part],
            )
