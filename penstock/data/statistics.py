"""What a split's sequences are like: lengths, weights, duplicates, fertility, passages to look at.

`report/inspection_data.py` shows it. Small splits are examined whole, large ones by a sample spread
over them, in bounded memory and time. It must never write.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from penstock.data.formats.indexed import Reader as IndexedReader
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import LARGEST_ID, Joined, Reader, TokenSequence, check_sequence
from penstock.data.tokenizer import Tokenizer

WHOLE_BYTES = 256 << 20
"""A split of up to this many bytes is examined whole."""
_SAMPLE_TOKENS = 1 << 22
"""Tokens looked at in a larger one, and of any one sequence."""
_SAMPLE_FILES = 32
_SAMPLE_SEQUENCES = 20_000
_DECODED_TOKENS = 1 << 18
"""Tokens decoded for the fertility."""
_PASSAGE_TOKENS = 256
_BEGIN_TOKENS, _BEFORE_TOKENS = 96, 64
"""Of a sequence whose weight changes further on: its first tokens, and those before the change."""
_LEFT_OUT = " … "
_PASSAGES = 3
_CATEGORIES = 1000


@dataclasses.dataclass(frozen=True)
class Passage:
    """The beginning of a sequence, and where its loss weight first changes, to look at."""

    sequence: int
    """Which of those examined."""
    tokens: int
    """Tokens of the whole sequence."""
    parts: list[tuple[str, float]]
    """Stretches of text, or of ids where no tokenizer is known, and their loss weight; dots of
    weight 0 stand for what is left out."""


@dataclasses.dataclass
class Statistics:
    """Figures of the sequences examined."""

    is_whole: bool
    """Whether these are all there are."""
    sequences: int = 0
    tokens: int = 0
    longest: int = 0
    shortest: int = LARGEST_ID
    largest: int = 0
    """Largest token id."""
    weighted: bool = False
    """Whether some token weighs other than 1."""
    weight: float = 0.0
    """Sum of the loss weights."""
    duplicates: int = 0
    """Sequences equal to one before."""
    histogram: dict[int, int] = dataclasses.field(default_factory=dict[int, int])
    """Sequences by the number of binary digits of their length."""
    categories: dict[int, int] = dataclasses.field(default_factory=dict[int, int])
    """Tokens by the number of their category, -1 for none; of at most `_CATEGORIES` numbers."""
    begins: list[int] = dataclasses.field(default_factory=list[int])
    """First tokens of the first sequence."""
    passages: list[Passage] = dataclasses.field(default_factory=list[Passage])
    decoded_tokens: int = 0
    decoded_bytes: int = 0
    decoded_words: int = 0

    def bins(self) -> list[tuple[str, int]]:
        """(lengths, sequences) for every power of two between the shortest and the longest."""
        if not self.histogram:
            return []
        digits = range(min(self.histogram), max(self.histogram) + 1)
        return [(_lengths(digit), self.histogram.get(digit, 0)) for digit in digits]

    @property
    def tokens_per_word(self) -> float | None:
        """Tokens for each word between white space, of the text decoded."""
        return self.decoded_tokens / self.decoded_words if self.decoded_words else None

    @property
    def tokens_per_byte(self) -> float | None:
        """Tokens for each byte of UTF-8, of the text decoded."""
        return self.decoded_tokens / self.decoded_bytes if self.decoded_bytes else None

    def efficiency(self, capacity: int | None) -> float | None:
        """Share of rows of `capacity` tokens that is no padding."""
        if not capacity or not self.sequences:
            return None
        return self.tokens / (self.sequences * capacity)


def _lengths(digits: int) -> str:
    if digits == 0:
        return "0"
    low, high = 1 << (digits - 1), (1 << digits) - 1
    return f"{low:,}" if low == high else f"{low:,} – {high:,}"


def examine(
    reader: Reader, format: str, files: Sequence[Path], split: str, tokenizer: Tokenizer | None
) -> Statistics:
    """Look at a split's sequences, at all of them where they are few.

    Raises:
        DataError: damaged, or ids beyond the vocabulary.
    """
    is_whole = sum(file.stat().st_size for file in _with_data(files)) <= WHOLE_BYTES
    found = Statistics(is_whole)
    sizes = [reader.facts.vocab_size, None if tokenizer is None else tokenizer.vocab_size]
    largest = next((size - 1 for size in sizes if size is not None), LARGEST_ID)
    shown = _places(reader.facts.sequences)
    seen: set[bytes] = set()
    for sequence in reader.sequences() if is_whole else _sampled(format, files):
        part = _begin(sequence, _SAMPLE_TOKENS)
        check_sequence(part, f"the {split} split", largest)
        digest = hashlib.blake2b(np.ascontiguousarray(part.tokens).data, digest_size=12).digest()
        _add(found, sequence, part, is_new=digest not in seen)
        if len(seen) < 50 * _SAMPLE_SEQUENCES:
            seen.add(digest)
        if tokenizer is not None and found.decoded_tokens < _DECODED_TOKENS:
            _decode(found, part, tokenizer)
        if found.sequences - 1 in shown or (not is_whole and len(found.passages) < _PASSAGES):
            found.passages.append(_passage(found.sequences - 1, sequence, tokenizer))
    return found


def _with_data(files: Sequence[Path]) -> Iterator[Path]:
    """The files, and the data beside an index."""
    for file in files:
        yield file
        data = file.with_suffix(".bin")
        if file.suffix == ".idx" and data.is_file():
            yield data


def _places(sequences: int | None) -> frozenset[int]:
    """Which sequences are shown: the first, one in the middle, the last."""
    count = sequences or _PASSAGES
    return frozenset({0, count // 2, count - 1})


def _sampled(format: str, files: Sequence[Path]) -> Iterator[TokenSequence]:
    """Sequences from files spread over all; from an indexed file, spread over it too."""
    step = max(1, len(files) // _SAMPLE_FILES)
    chosen = files[::step][:_SAMPLE_FILES]
    for file in chosen:
        reader = FORMATS[format].read([file])
        tokens = 0
        for sequence in _spread(reader, max(1, _SAMPLE_SEQUENCES // len(chosen))):
            yield sequence
            tokens += len(sequence.tokens)
            if tokens * len(chosen) >= _SAMPLE_TOKENS:
                break


def _spread(reader: Reader, count: int) -> Iterator[TokenSequence]:
    """Sequences all over an indexed file; of any other, from its beginning."""
    parts = reader.readers if isinstance(reader, Joined) else [reader]
    inner = parts[0]
    if not isinstance(inner, IndexedReader):
        yield from itertools.islice(reader.sequences(), count)
        return
    total = inner.facts.sequences or 0
    # The middle of each stretch, shuffled so that any beginning of them is spread as well.
    places = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
    for place in np.random.default_rng(0).permutation(places):
        yield inner.at(int(place))


def _begin(sequence: TokenSequence, count: int) -> TokenSequence:
    """A sequence's first tokens: it can be a memory-mapped stream of any length."""
    return TokenSequence(
        sequence.tokens[:count],
        None if sequence.weights is None else sequence.weights[:count],
        None if sequence.roles is None else sequence.roles[:count],
        None if sequence.categories is None else sequence.categories[:count],
    )


def _add(found: Statistics, sequence: TokenSequence, part: TokenSequence, *, is_new: bool) -> None:
    length = len(sequence.tokens)
    if not found.sequences:
        found.begins = sequence.tokens[:8].tolist()
    found.sequences += 1
    found.tokens += length
    found.longest, found.shortest = max(found.longest, length), min(found.shortest, length)
    found.largest = max(found.largest, int(part.tokens.max()) if length else 0)
    found.duplicates += int(not is_new)
    digits = length.bit_length()
    found.histogram[digits] = found.histogram.get(digits, 0) + 1
    weight = length if part.weights is None else float(part.weights.sum(dtype=np.float64))
    found.weight += weight
    found.weighted |= part.weights is not None
    if part.categories is not None:
        numbers, counts = np.unique(part.categories, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number in found.categories or len(found.categories) < _CATEGORIES:
                found.categories[number] = found.categories.get(number, 0) + count


def _decode(found: Statistics, part: TokenSequence, tokenizer: Tokenizer) -> None:
    ids = np.asarray(part.tokens[:_DECODED_TOKENS])
    ids = ids[~np.isin(ids, tokenizer.frame)]
    text = tokenizer.decode(ids.tolist())
    found.decoded_tokens += len(ids)
    found.decoded_bytes += len(text.encode("utf-8", "replace"))
    found.decoded_words += len(text.split())


def _passage(number: int, sequence: TokenSequence, tokenizer: Tokenizer | None) -> Passage:
    """What is shown of a sequence, cut where the weight changes."""
    part = _begin(sequence, _SAMPLE_TOKENS)
    weights = part.loss_weights()
    changes = np.flatnonzero(np.diff(weights)) + 1
    parts: list[tuple[str, float]] = []
    end = 0
    for first, last in _stretches(len(weights), int(changes[0]) if len(changes) else 0):
        if first > end:
            parts.append((_LEFT_OUT, 0.0))
        inside = changes[(changes > first) & (changes < last)].tolist()
        for begin, end in itertools.pairwise([first, *inside, last]):
            ids = part.tokens[begin:end].tolist()
            text = " ".join(map(str, ids)) + " "
            if tokenizer is not None:
                before = part.tokens[max(0, begin - 1) : begin].tolist()
                text = tokenizer.decode_after(before, ids)
            parts.append((text, float(weights[begin])))
    if end < len(sequence.tokens):
        parts.append((_LEFT_OUT, 0.0))
    return Passage(number, len(sequence.tokens), parts)


def _stretches(length: int, change: int) -> list[tuple[int, int]]:
    """Tokens that are shown of a sequence of so many whose weight first changes at `change`."""
    if change + _BEFORE_TOKENS < _PASSAGE_TOKENS:
        return [(0, min(length, _PASSAGE_TOKENS))] if length else []
    after = change + _PASSAGE_TOKENS - _BEGIN_TOKENS - _BEFORE_TOKENS
    return [(0, _BEGIN_TOKENS), (change - _BEFORE_TOKENS, min(length, after))]
