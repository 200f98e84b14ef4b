"""Training samples by their position in a run: of one split, or of several in proportion.

The loader asks for rows; where a run stands is one number. It must never hold a generator, nor
know about batches or models.
"""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.data.blend import History
from penstock.data.order import permute
from penstock.errors import DataError


class Row(NamedTuple):
    """One sample."""

    tokens: NDArray[np.int64]
    """(T,)."""
    targets: NDArray[np.int64]
    """(T,): the next token."""
    weights: NDArray[np.float32]
    """(T,): loss weight of each target."""
    length: int
    """Tokens that are not padding."""


class Samples(Protocol):
    """What a run is trained on."""

    @property
    def count(self) -> int | None:
        """Samples of one epoch; None where there is no end."""
        ...

    def rows(self, position: int, count: int) -> list[Row]:
        """Samples `position` and after, counted over all epochs."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the position, after the rows last given."""
        ...

    def resume(self, state: Mapping[str, Any], position: int) -> None:
        """Go on from a checkpoint's state and position."""
        ...

    def drawn(self, position: int) -> dict[str, int]:
        """Samples of each member before `position`; empty where there is only one."""
        ...

    def close(self) -> None:
        """Stop whatever works in the background."""
        ...


class Sequences(Protocol):
    """A split, as far as samples are cut from it."""

    @property
    def packing(self) -> str:
        """How its sequences are laid out: data.packing."""
        ...

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def token_count(self) -> int:
        """Tokens it has."""
        ...

    def samples(self, sequence_length: int) -> int:
        """Sequences of one pass."""
        ...

    def sample(
        self, index: int, sequence_length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Inputs, targets and loss weights of one sequence."""
        ...

    def length(self, index: int, sequence_length: int) -> int:
        """How many of its inputs are not padding."""
        ...


class SplitSamples:
    """The samples of one split, in a new order each epoch."""

    def __init__(
        self,
        split: Sequences,
        sequence_length: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        limit: int | None = None,
    ) -> None:
        """`limit` uses only that many samples of each epoch's order.

        Raises:
            DataError: the split has not one whole sequence.
        """
        self.split = split
        self._length = sequence_length
        self._seed = seed
        self._shuffle = shuffle
        self._total = split.samples(sequence_length)
        if split.token_count < 2:
            raise DataError(
                f"split {split.name} has {split.token_count} tokens",
                where="data.split",
                do="use more text, or change data.splits",
            )
        self.count: int = self._total if limit is None else min(limit, self._total)
        """Samples of one epoch."""

    def rows(self, position: int, count: int) -> list[Row]:
        """Samples `position` and after, counted over all epochs."""
        indices = self.indices(np.arange(position, position + count))
        return [self.row(int(index)) for index in indices]

    def row(self, index: int) -> Row:
        """One sample by its number in the split."""
        return Row(*self.split.sample(index, self._length), self.length(index))

    def length(self, index: int) -> int:
        """How many tokens of a sample are not padding."""
        return self.split.length(index, self._length)

    def state(self) -> dict[str, Any]:
        """Nothing: the position says all."""
        return {}

    def resume(self, state: Mapping[str, Any], position: int) -> None:
        """Nothing to do."""

    def drawn(self, position: int) -> dict[str, int]:
        """Nothing: there is one split."""
        return {}

    def close(self) -> None:
        """Nothing: samples are cut when they are asked for."""

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample of the split for each position."""
        epochs, places = np.divmod(positions, self.count)
        if not self._shuffle:
            return places
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = permute(places[chosen], self._total, self._seed, int(epoch))
        return result


class BlendedSamples:
    """Several splits in proportion; each goes through its own epochs in its own order."""

    def __init__(
        self, members: Mapping[str, SplitSamples], weights: Mapping[str, Fraction]
    ) -> None:
        """Members and their weights by name."""
        self._members = dict(members)
        self._weights = dict(weights)
        self.history = History([]).then(0, weights)

    @property
    def count(self) -> int:
        """Samples until every member with a weight has been gone through once."""
        total = sum(self._weights.values())
        return max(
            -(-self._members[name].count * total // weight)
            for name, weight in self._weights.items()
            if weight > 0
        )

    def rows(self, position: int, count: int) -> list[Row]:
        """Samples `position` and after, each from the member whose turn it is."""
        found: list[Row] = []
        for place in range(position, position + count):
            name, number = self.history.locate(place)
            found += self._members[name].rows(number, 1)
        return found

    def state(self) -> dict[str, Any]:
        """The weights there were, and from where on."""
        return {"mixture": self.history.json()}

    def resume(self, state: Mapping[str, Any], position: int) -> None:
        """Go on; weights that have changed since hold from `position`.

        Raises:
            CheckpointError: the state is damaged.
        """
        before = History.from_json(state.get("mixture", []))
        self.history = before.then(position, self._weights)

    def drawn(self, position: int) -> dict[str, int]:
        """Samples of each member before `position`."""
        return self.history.counts(position)

    def close(self) -> None:
        """Nothing: samples are cut when they are asked for."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One part of the validation."""

    name: str
    """Member it belongs to; empty where there is only one."""
    weight: float
    """Its part in the validation loss."""
    samples: SplitSamples
