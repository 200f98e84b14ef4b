"""Rows of tokens made from text as it is read, from any place in a source on.

`data/streaming.py` draws windows of rows from here. A row depends on the source, the tokenizer, the
packing and its cursor alone. It must never know about threads, windows or batches.
"""

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.console import get_console
from penstock.data.formats.sequence import TokenSequence
from penstock.data.order import permute
from penstock.data.packing import Packing
from penstock.data.sources.piece import READ, Piece, Tally
from penstock.data.tokenize import Shard
from penstock.errors import DataError

_BATCH_CHARACTERS = 1 << 18
"""Text tokenized at a time: enough for all of the tokenizer's threads, and soon done."""


class Cursor(NamedTuple):
    """Where a row begins."""

    shard: int
    """Number of the shard, counted over all epochs."""
    piece: int
    """Piece of the shard's text."""
    offset: int
    """Tokens of the piece that come before; with greedy and single packing, sequences of it."""


class StreamRow(NamedTuple):
    """A row of at most T + 1 tokens, and where the next one begins."""

    sequence: TokenSequence
    after: Cursor


class LeftOut:
    """What the parts of a source leave out or mend, each counted once however often it is read."""

    def __init__(self) -> None:
        self._of: dict[int, Counter[str]] = {}
        self._told: set[str] = set()

    def add(self, shard: Shard, tally: Tally) -> None:
        """A shard has been read to its end; a kind that is new is told, with its first place."""
        found = Counter({name: n for name, n in tally.counts.items() if name not in READ})
        if not found:
            return
        self._of[shard.index] = found
        new = found.keys() - self._told
        self._told |= new
        if new:
            first = f", first {tally.places[0]}" if tally.places else ""
            get_console().warning(f"the stream has {', '.join(sorted(new))}{first}")

    def go_on(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Take over what `counts` gave to a checkpoint."""
        self._of.update({int(shard): Counter(found) for shard, found in counts.items()})

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each shard that was read to its end and had any, by its number."""
        return {str(shard): dict(counts) for shard, counts in self._of.copy().items()}


@dataclasses.dataclass(frozen=True)
class StreamText:
    """What rows depend on."""

    shards: Sequence[Shard]
    read: Callable[[Shard, Tally], Iterator[tuple[str, Piece]]]
    """The pieces of a shard's text, with their splits."""
    encode: Callable[[Sequence[Piece], Tally], list[list[TokenSequence]]]
    """The token sequences of each piece; end-of-text is behind each document."""
    end_of_text: int
    split: str
    packing: Packing
    sequence_length: int
    seed: int
    shuffle: bool = True
    """Whether shards come in another order each epoch."""
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    """What was left out on the way."""


class _Part(NamedTuple):
    """A token sequence and where it lies."""

    at: Cursor
    sequence: TokenSequence
    ends: bool
    """Whether a document ends behind it."""


def rows_from(text: StreamText, start: Cursor, step: int = 1) -> Iterator[StreamRow]:
    """Rows from a cursor on, for ever; of the shards' order every `step`-th is taken."""
    parts = _parts(text, start, step)
    if text.packing.kind == "full":
        rows = _full_rows(parts, text.sequence_length)
    else:
        rows = _packed_rows(_documents(parts), text.packing, text.sequence_length + 1)
    # A row of which nothing weighs has nothing to teach.
    return (r for r in rows if r.sequence.weights is None or r.sequence.weights[1:].any())


def shard_at(text: StreamText, number: int) -> Shard:
    """The shard of a number counted over all epochs."""
    epoch, place = divmod(number, len(text.shards))
    if text.shuffle:
        place = int(permute(np.array([place]), len(text.shards), text.seed, epoch)[0])
    return text.shards[place]


def _parts(text: StreamText, start: Cursor, step: int) -> Iterator[_Part]:
    """Token sequences from a cursor on; what lies before it in its shard is read, not tokenized.

    Raises:
        DataError: all shards have been gone through without a token.
    """
    empty = 0
    for number in itertools.count(start.shard, step):
        is_empty = True
        first = start.piece if number == start.shard else 0
        for part in _shard_parts(text, number, first):
            is_empty = False
            if part.at.shard == start.shard and part.at.piece == start.piece:
                if text.packing.kind == "full":
                    part = _without(part, start.offset)  # noqa: PLW2901 - the same, shortened
                elif part.at.offset < start.offset:
                    continue
            yield part
        empty = empty + 1 if is_empty else 0
        if empty > len(text.shards):
            raise DataError(
                f"the source has no text for the split {text.split}",
                where="source",
                do="check source.path and data.splits",
            )


def _shard_parts(text: StreamText, number: int, first: int) -> Iterator[_Part]:
    """The token sequences of one shard, from its piece `first` on."""
    held: _Part | None = None
    shard, tally = shard_at(text, number), Tally()
    for batch in _batches(text, shard, first, tally):
        encoded = text.encode([piece for _, piece in batch], tally)
        for (index, piece), sequences in zip(batch, encoded, strict=True):
            joined = _joined(sequences) if text.packing.kind == "full" else sequences
            for offset, sequence in enumerate(joined):
                if held is not None:
                    yield held
                held = _Part(Cursor(number, index, offset), sequence, piece.ends)
    text.left_out.add(shard, tally)
    if held is not None and not held.ends:
        # The document goes on in another shard, which comes at another time.
        end = TokenSequence(np.array([text.end_of_text], np.int32))
        held = _Part(held.at, _concatenate([held.sequence, end]), True)
    if held is not None:
        yield held


def _batches(
    text: StreamText, shard: Shard, first: int, tally: Tally
) -> Iterator[list[tuple[int, Piece]]]:
    """Pieces of the split with their numbers, some text at a time."""
    batch: list[tuple[int, Piece]] = []
    size = 0
    for index, (split, piece) in enumerate(text.read(shard, tally)):
        if index < first or split != text.split:
            continue
        batch.append((index, piece))
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _joined(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """All sequences of a piece as one."""
    if len(sequences) < 2:
        return list(sequences)
    return [_concatenate(sequences)]


def _without(part: _Part, count: int) -> _Part:
    """A part without its first tokens."""
    left = _cut(part.sequence, count, len(part.sequence.tokens))
    return _Part(part.at._replace(offset=count), left, part.ends)


def _full_rows(parts: Iterator[_Part], length: int) -> Iterator[StreamRow]:
    """Everything back to back, cut every `length` tokens; a row has one token more."""
    held: deque[_Part] = deque()
    count = 0
    while True:
        while count <= length:
            part = next(parts)
            if len(part.sequence.tokens):
                held.append(part)
                count += len(part.sequence.tokens)
        row = _cut(_concatenate([part.sequence for part in held]), 0, length + 1)
        left = length
        while len(held[0].sequence.tokens) <= left:
            left -= len(held.popleft().sequence.tokens)
        first = held[0]
        if left:
            sequence = _cut(first.sequence, left, len(first.sequence.tokens))
            at = first.at._replace(offset=first.at.offset + left)
            held[0] = _Part(at, sequence, first.ends)
        count -= length
        yield StreamRow(row, held[0].at)


def _documents(parts: Iterator[_Part]) -> Iterator[_Part]:
    """Whole documents; the cursor is that of the first part."""
    begun: list[_Part] = []
    for part in parts:
        begun.append(part)
        if part.ends:
            yield _Part(begun[0].at, _concatenate([one.sequence for one in begun]), True)
            begun = []


def _packed_rows(documents: Iterator[_Part], packing: Packing, limit: int) -> Iterator[StreamRow]:
    """Whole documents in rows of at most `limit` tokens, as `articles.pack_articles` puts them: one
    longer than a row ends the row before it, also when it is dropped.
    """
    row: list[TokenSequence] = []
    used = 0
    for document in documents:
        whole, size = document.sequence, len(document.sequence.tokens)
        if row and (packing.kind == "single" or used + size > limit):
            yield StreamRow(_concatenate(row), document.at)
            row, used = [], 0
        if size > limit:
            if packing.overflow == "drop":
                continue
            first = size - limit if packing.overflow == "truncate_left" else 0
            whole, size = _cut(whole, first, first + limit), limit
        row.append(whole)
        used += size


def _cut(sequence: TokenSequence, first: int, last: int) -> TokenSequence:
    weights = None if sequence.weights is None else sequence.weights[first:last]
    return TokenSequence(sequence.tokens[first:last], weights)


def _concatenate(sequences: Sequence[TokenSequence]) -> TokenSequence:
    """Sequences as one, with weights where any has some."""
    if len(sequences) == 1:
        return sequences[0]
    weights: NDArray[np.float32] | None = None
    if any(sequence.weights is not None for sequence in sequences):
        weights = np.concatenate([sequence.loss_weights() for sequence in sequences])
    return TokenSequence(np.concatenate([s.tokens for s in sequences]), weights)
