"""Which dataset of a mixture each sample comes from: proportioned exactly at every moment.

`data/samples.py` asks it where a position lies. It holds a table of one period and no other state,
so that any position is found at once. It must never know what the datasets hold.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import CheckpointError

LONGEST_PERIOD = 1 << 16
"""Samples after which the order of members repeats, at most."""


def shares_of(weights: Sequence[Fraction]) -> list[int]:
    """Samples of each member in one period, as the weights say.

    Exact where the weights have a common denominator of up to 65,536; else the nearest such
    shares, and at least one sample of each member with a weight.
    """
    total = sum(weights)
    whole = [weight / total for weight in weights]
    period = math.lcm(*(weight.denominator for weight in whole))
    if period <= LONGEST_PERIOD:
        return [int(weight * period) for weight in whole]
    shares = [max(int(weight * LONGEST_PERIOD), int(weight > 0)) for weight in whole]
    missing = [weight * LONGEST_PERIOD - share for weight, share in zip(whole, shares, strict=True)]
    for member in sorted(range(len(shares)), key=lambda m: missing[m], reverse=True):
        if sum(shares) < LONGEST_PERIOD and weights[member] > 0:
            shares[member] += 1
    return shares


def order_of_period(shares: Sequence[int]) -> NDArray[np.uint16]:
    """Member of each sample of one period, (sum of shares,).

    After n samples a member has fewer than one more or less than n times its share: its j-th
    sample lies in the window from ⌊(j-1)/share⌋ to ⌈j/share⌉, and of those whose window is open
    the one that closes first is taken, which misses none (Baruah et al., "Proportionate
    Progress", Algorithmica 15, 1996; the problem is Tijdeman's chairman assignment, 1980).
    """
    period = sum(shares)
    windows = sorted(
        (j * period // share, -(-(j + 1) * period // share), member)
        for member, share in enumerate(shares)
        for j in range(share)
    )
    order = np.empty(period, np.uint16)
    opened: list[tuple[int, int]] = []
    coming = 0
    for place in range(period):
        while coming < period and windows[coming][0] <= place:
            heapq.heappush(opened, windows[coming][1:])
            coming += 1
        order[place] = heapq.heappop(opened)[1]
    return order


class Blend:
    """One fixed set of weights."""

    def __init__(self, weights: Mapping[str, Fraction]) -> None:
        """Weights by member, at least one above 0."""
        self.names: tuple[str, ...] = tuple(weights)
        self.shares: tuple[int, ...] = tuple(shares_of(list(weights.values())))
        total = sum(weights.values())
        self.is_rounded = any(
            Fraction(share, sum(self.shares)) != weight / total
            for share, weight in zip(self.shares, weights.values(), strict=True)
        )
        """Whether the weights could not be kept exactly."""
        self._order = order_of_period(self.shares)
        self._ranks = np.empty(len(self._order), np.int64)
        """Samples of the same member before each place of the period."""
        for member, share in enumerate(self.shares):
            self._ranks[self._order == member] = np.arange(share)

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Member, and number among the member's samples, of each place from 0."""
        periods, within = np.divmod(places, len(self._order))
        members = self._order[within].astype(np.int64)
        return members, periods * np.array(self.shares)[members] + self._ranks[within]

    def counts(self, length: int) -> dict[str, int]:
        """Samples of each member among the first `length`."""
        periods, within = divmod(length, len(self._order))
        rest = np.bincount(self._order[:within], minlength=len(self.shares))
        return {
            name: periods * share + int(more)
            for name, share, more in zip(self.names, self.shares, rest, strict=True)
        }


@dataclasses.dataclass(frozen=True)
class Segment:
    """Weights that hold from a position on."""

    start: int
    """First sample, over the whole run."""
    weights: tuple[tuple[str, Fraction], ...]
    """By member; they need not sum to 1."""

    @functools.cached_property
    def blend(self) -> Blend:
        """The order of members from `start`."""
        return Blend(dict(self.weights))


class History:
    """Weights over a run: changing them leaves what was drawn before as it was."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        """In the order of their starts; at least one."""
        self.segments: tuple[Segment, ...] = tuple(segments)

    def then(self, start: int, weights: Mapping[str, Fraction]) -> "History":
        """The same up to `start`, and these weights from there on."""
        kept = [segment for segment in self.segments if segment.start < start]
        if kept and _relative(dict(kept[-1].weights)) == _relative(weights):
            return History(kept)
        return History([*kept, Segment(start, tuple(weights.items()))])

    def counts(self, position: int) -> dict[str, int]:
        """Samples drawn of each member before `position`."""
        counts: dict[str, int] = {}
        ends = [segment.start for segment in self.segments[1:]] + [position]
        for segment, end in zip(self.segments, ends, strict=True):
            length = min(end, position) - segment.start
            for name, count in segment.blend.counts(max(0, length)).items():
                counts[name] = counts.get(name, 0) + count
        return counts

    def locate(self, position: int) -> tuple[str, int]:
        """Member, and number among the member's samples, of one position."""
        segment = next(s for s in reversed(self.segments) if s.start <= position)
        members, numbers = segment.blend.locate(np.array([position - segment.start]))
        name = segment.blend.names[int(members[0])]
        return name, self._before(segment).get(name, 0) + int(numbers[0])

    def json(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [
            {"start": s.start, "weights": [[name, str(weight)] for name, weight in s.weights]}
            for s in self.segments
        ]

    @staticmethod
    def from_json(values: Any) -> "History":  # noqa: ANN401 - what a checkpoint holds
        """What `json` gave.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            return History(
                [
                    Segment(
                        int(v["start"]),
                        tuple((str(name), Fraction(weight)) for name, weight in v["weights"]),
                    )
                    for v in values
                ]
            )
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                "the checkpoint's mixture is damaged", where="run", do="restore it from a copy"
            ) from None

    def _before(self, segment: Segment) -> dict[str, int]:
        """Samples drawn of each member before a segment began."""
        if segment not in self._drawn:
            self._drawn[segment] = self.counts(segment.start)
        return self._drawn[segment]

    @functools.cached_property
    def _drawn(self) -> dict[Segment, dict[str, int]]:
        return {}


def _relative(weights: Mapping[str, Fraction]) -> dict[str, Fraction]:
    """Weights above 0 as parts of their sum."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight > 0}
