"""What a conversion will do: each split measured, one layout for all of them, and what is lost.

`convert.py` carries it out. It must never write.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from penstock.config.data import DataSection
from penstock.data.convert_text import Vocabulary
from penstock.data.formats.registry import Format
from penstock.data.formats.sequence import LARGEST_ID, Layout, Reader, TokenSequence
from penstock.data.measure import Measure, measure
from penstock.data.packing import parse_packing
from penstock.errors import ConfigError, DataError


class Pieces:
    """A reader's sequences, cut where they are longer than rows of a given length."""

    def __init__(self, reader: Reader, length: int | None, extra: int) -> None:
        """None: nothing is cut. `extra`: tokens a row holds beyond its length."""
        self._reader, self._length, self._extra = reader, length, extra
        self.cuts = 0
        """Sequences that had to be cut so far."""

    def __iter__(self) -> Iterator[TokenSequence]:
        """Yield the pieces; where rows hold shifted labels too, they overlap by one token, so
        that each token is a target once.
        """
        for sequence in self._reader.sequences():
            count, length = len(sequence.tokens), self._length
            if length is None or count <= length + self._extra:
                yield sequence
                continue
            self.cuts += 1
            for first in range(0, count - self._extra, length):
                part = slice(first, first + length + self._extra)
                yield TokenSequence(
                    sequence.tokens[part],
                    None if sequence.weights is None else sequence.weights[part],
                    None if sequence.roles is None else sequence.roles[part],
                    None if sequence.categories is None else sequence.categories[part],
                )


@dataclasses.dataclass(frozen=True)
class Job:
    """One split's way from reader to writer."""

    split: str
    pieces: Pieces
    found: Measure
    layout: Layout


def plan_conversion(
    readers: Mapping[str, Reader], target: Format, data: DataSection, vocabulary: Vocabulary
) -> tuple[list[Job], list[str]]:
    """Measure every split that holds tokens; their jobs, and what the target cannot hold.

    Raises:
        DataError: a damaged source, no tokens, or ids the target cannot hold.
        ConfigError: settings that contradict each other.
    """
    packed = _is_packed(data)
    facts = [reader.facts for reader in readers.values()]
    sizes = [vocabulary.size, *(f.vocab_size for f in facts)]
    paddings = [vocabulary.padding, *(f.padding for f in facts), 0]
    vocab_size = next((size for size in sizes if size is not None), None)
    padding = next(p for p in paddings if p is not None)
    largest = LARGEST_ID if vocab_size is None else vocab_size - 1
    measured: dict[str, tuple[Pieces, Measure]] = {}
    for split, reader in readers.items():
        pieces = Pieces(reader, data.sequence_length, target.extra)
        found = measure(pieces, f"the {split} split", padding, largest)
        if found.tokens:
            _require_room(split, found, target)
            measured[split] = (pieces, found)
    if not measured:
        raise DataError("the source holds no tokens", where="from", do="check the path")
    common = _common_layout([found for _, found in measured.values()], target, data)
    common = dataclasses.replace(common, padding=padding, vocab_size=vocab_size, packed=packed)
    jobs = [Job(split, *both, _own(common, both[1], target)) for split, both in measured.items()]
    lost = [what for job in jobs for what in _losses(job.found, target, packed)]
    if cuts := sum(job.pieces.cuts for job in jobs):
        lost.insert(
            0, f"{cuts:,} sequences of more than {data.sequence_length} tokens in one piece"
        )
    return jobs, list(dict.fromkeys(lost))


def _require_room(split: str, found: Measure, target: Format) -> None:
    """Refuse ids and lengths the target has no room for."""
    if found.largest > target.largest:
        raise DataError(
            f"{target.title} cannot hold token {found.largest}, only up to {target.largest}",
            where="data.format",
            do="choose another format",
        )
    if target.longest is not None and found.longest > target.longest + target.extra:
        raise ConfigError(
            f"the {split} split has a sequence of {found.longest:,} tokens",
            where="data.sequence_length",
            do="set data.sequence_length, which cuts longer sequences",
        )


def _common_layout(found: list[Measure], target: Format, data: DataSection) -> Layout:
    """What all splits share: rows of one width, one element type, the same columns."""
    longest = max(one.longest for one in found)
    return Layout(
        width=data.sequence_length or max(1, longest - target.extra),
        largest=max(one.largest for one in found),
        weights=any(one.weighted for one in found),
        roles=any(one.roles for one in found),
        categories=any(one.categories for one in found),
    )


def _own(common: Layout, found: Measure, target: Format) -> Layout:
    """The layout with one split's own counts."""
    return dataclasses.replace(
        common,
        width=common.width if target.fixed_width else max(1, found.longest),
        sequences=found.sequences,
        tokens=found.tokens,
        equal=found.equal,
    )


def _is_packed(data: DataSection) -> bool:
    """Conversion keeps sequences as they are; only Cerebras' files mark several in a row."""
    if parse_packing(data.packing).kind == "full":
        return False
    target: str = data.format
    if target == "cerebras" and parse_packing(data.packing).kind == "greedy":
        return True
    raise ConfigError(
        f"converting to {data.format} does not pack",
        where="data.packing",
        do="leave data.packing out, or prepare from the text; greedy:: is for data.format=cerebras",
    )


def _losses(found: Measure, target: Format, packed: bool) -> list[str]:
    """What a format cannot hold of such sequences."""
    borders = target.borders == "any" or (target.borders == "equal lengths" and found.equal)
    cases = {
        "borders between sequences": found.sequences > 1 and not borders,
        "loss weights": found.weighted and target.weights == "none",
        "loss weights other than 0 and 1": found.fractional and target.weights == "zero or one",
        "roles of tokens": found.roles and not target.roles,
        "categories of tokens": bool(found.categories) and not target.categories,
        "the weight of a sequence's first token": found.first_alone and not target.first_weight,
        "the end of sequences that end like padding": bool(found.like_padding)
        and target.fixed_width,
        "sequences without tokens": bool(found.empty) and packed,
    }
    return [what for what, is_lost in cases.items() if is_lost]
