"""Several datasets to train on at once, in the proportions of their weights.

`planning.py` opens what the configuration names here. It must never know about models or devices.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from penstock.config.data import DataSection, TokenizerSection
from penstock.console import get_console
from penstock.data.blend import Blend
from penstock.data.dataset import Dataset
from penstock.data.members import open_any
from penstock.data.samples import BlendedSamples, HeldOut
from penstock.data.tokenizer import Tokenizer
from penstock.errors import ConfigError

_WHERE = "data.mixture"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Datasets and their weights, by name."""

    members: dict[str, Dataset]
    weights: dict[str, Fraction] | None
    """None: in proportion to their samples."""

    @property
    def path(self) -> Path:
        """The first member's folder."""
        return self._first.path

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer all members share."""
        return self._first.vocab_size

    @property
    def end_of_text(self) -> int:
        """The tokenizer's end-of-text token."""
        return self._first.end_of_text

    @property
    def tokenizer_sha256(self) -> str:
        """Identity of the tokenizer."""
        return self._first.tokenizer_sha256

    @property
    def sequence_length(self) -> int | None:
        """What all members were prepared for; None where they differ."""
        lengths = {member.sequence_length for member in self.members.values()}
        return lengths.pop() if len(lengths) == 1 else None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer all members share."""
        return self._first.tokenizer()

    def training(self, split: str, sequence_length: int, seed: int) -> BlendedSamples:
        """The samples of each member's split, in proportion.

        Raises:
            DataError: a member has no such split, or not one sequence in it.
        """
        samples = {
            name: member.training(split, sequence_length, seed)
            for name, member in self.members.items()
        }
        return BlendedSamples(samples, self.proportions(split, sequence_length))

    def validation(self, split: str, sequence_length: int, limit: int | None) -> list[HeldOut]:
        """A fixed choice of `limit` samples of each member, where the split has any."""
        weights = self.proportions(split, sequence_length)
        total = sum(weights.values())
        return [
            dataclasses.replace(part, name=name, weight=float(weights[name] / total))
            for name, member in self.members.items()
            for part in member.validation(split, sequence_length, limit)
        ]

    def proportions(self, split: str, sequence_length: int) -> dict[str, Fraction]:
        """The weights as they were given, else the number of each member's samples."""
        if self.weights is not None:
            return self.weights
        return {
            name: Fraction(member.split(split).samples(sequence_length))
            for name, member in self.members.items()
        }

    def announce(self, split: str, sequence_length: int) -> None:
        """Members, their shares, how much there is of each and how long it lasts."""
        weights = self.proportions(split, sequence_length)
        total = sum(weights.values())
        rows: list[list[str]] = []
        for name, member in self.members.items():
            opened = member.split(split)
            samples = opened.samples(sequence_length)
            lasts = f"{-(-samples * total // weights[name]):,}" if weights[name] else "–"
            share = f"{float(weights[name] / total):.2%}"
            rows.append([name, share, f"{opened.token_count:,}", f"{samples:,}", lasts])
        console = get_console()
        columns = ["mixture", "share", "tokens", "samples", "all of it in samples"]
        console.table("", columns, rows)
        if Blend(weights).is_rounded:
            console.info("shares are kept in 65,536ths: the weights have no smaller denominator")

    @property
    def _first(self) -> Dataset:
        return next(iter(self.members.values()))


def open_mixture(data: DataSection, tokenizer: TokenizerSection) -> Mixture:
    """Open every member of `data.mixture`, in any recognised format.

    Raises:
        ConfigError: no weights or paths where they should be, or members of several tokenizers.
        DataError: a member is missing or damaged.
    """
    paths, weights = _parse(data.mixture or [])
    members: dict[str, Dataset] = {}
    for path in paths:
        members[_new_name(path, members)] = open_any(path, data, tokenizer)
    first = next(iter(members.values()))
    for member in members.values():
        if member.tokenizer_sha256 != first.tokenizer_sha256:
            raise ConfigError(
                f"{member.path} was made with another tokenizer than {first.path}",
                where=_WHERE,
                do="prepare all members with the same tokenizer.from",
            )
    by_name = None if weights is None else dict(zip(members, weights, strict=True))
    return Mixture(members, by_name)


def _parse(items: Sequence[str]) -> tuple[list[Path], list[Fraction] | None]:
    """Paths, and their weights where there are any: [0.7, A, 0.3, B], or [A, B].

    Raises:
        ConfigError: neither of these.
    """
    if not items or _number(items[0]) is None:
        return list(_paths(items)), None
    weights = [_number(item) for item in items[::2]]
    paths = list(_paths(items[1::2]))
    found = [weight for weight in weights if weight is not None and weight >= 0]
    if len(found) != len(paths) or len(items) % 2 or sum(found) == 0:
        raise ConfigError(
            f"data.mixture=[{', '.join(items)}] is no list of weights and datasets in turn",
            where=_WHERE,
            do="write data.mixture=[0.7,FOLDER_A,0.3,FOLDER_B], or folders alone",
        )
    return paths, found


def _paths(items: Sequence[str]) -> Iterator[Path]:
    if not items:
        raise ConfigError("the mixture is empty", where=_WHERE, do="name two datasets or more")
    for item in items:
        if _number(item) is not None:
            raise ConfigError(
                f"{item} stands where a dataset should", where=_WHERE, do="put weights first"
            )
        yield Path(item).expanduser()


def _number(item: str) -> Fraction | None:
    """A weight, exactly as it is written; None where the item is none."""
    try:
        return Fraction(item.strip())
    except (ValueError, ZeroDivisionError):
        return None


def _new_name(path: Path, taken: dict[str, Dataset]) -> str:
    """What a member is called: the last part of its path, with a number where that is taken."""
    name = path.resolve().name
    number = 2
    while name in taken:
        name = f"{path.resolve().name}#{number}"
        number += 1
    return name
