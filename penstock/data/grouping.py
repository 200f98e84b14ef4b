"""Samples of like length beside each other, so that steps of short ones can be cut short.

`train_setting.py` wraps a split's samples in it where `data.group_by_length` asks for it, the
loader cuts by `longest`. It must never hold a generator.

Source: `transformers`' LengthGroupedSampler: a shuffled epoch is sorted by length within windows of
fifty batches. Ours also shuffles the batches of a window, so that lengths do not fall in waves.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.data.order import permute
from penstock.data.packing import parse_packing
from penstock.data.samples import Row, Samples, SplitSamples
from penstock.errors import ConfigError

_WINDOW_BATCHES = 50


class GroupedSamples:
    """A split's samples, each epoch's in an order of its own in which neighbours are alike."""

    def __init__(self, samples: SplitSamples, batch: int, seed: int) -> None:
        """`batch`: sequences of one optimizer step."""
        self._inner = samples
        self._batch = batch
        self._seed = seed
        self.count: int = samples.count
        """Samples of one epoch."""
        self._window = functools.lru_cache(maxsize=4)(self._sorted_window)

    def rows(self, position: int, count: int) -> list[Row]:
        """Samples `position` and after, counted over all epochs."""
        return [self._inner.row(index) for index in self._indices(position, count)]

    def longest(self, position: int, count: int) -> int:
        """Tokens of the longest of these samples that are not padding."""
        return max(self._inner.length(index) for index in self._indices(position, count))

    def _indices(self, position: int, count: int) -> list[int]:
        """Sample of the split for each position."""
        size = self._batch * _WINDOW_BATCHES
        found: list[int] = []
        for place in range(position, position + count):
            epoch, within = divmod(place, self.count)
            window, offset = divmod(within, size)
            found.append(int(self._window(epoch, window)[offset]))
        return found

    def _sorted_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The samples of one window of an epoch: sorted by length, then batch by batch shuffled;
        what fills no batch comes last.
        """
        size = self._batch * _WINDOW_BATCHES
        first = epoch * self.count + window * size
        last = min(first + size, (epoch + 1) * self.count)
        indices = self._inner.indices(np.arange(first, last))
        lengths = np.array([self._inner.length(int(index)) for index in indices])
        indices = indices[np.argsort(-lengths, kind="stable")]
        whole = len(indices) // self._batch
        if whole == 0:
            return indices
        batches = indices[: whole * self._batch].reshape(whole, self._batch)
        seed = self._seed + (window << 20)
        order = permute(np.arange(whole), whole, seed, epoch)
        return np.concatenate([batches[order].reshape(-1), indices[whole * self._batch :]])

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


def grouped(samples: Samples, batch: int, seed: int) -> GroupedSamples:
    """The samples in groups of like length.

    Raises:
        ConfigError: they are of a mixture or a stream, or all equally long.
    """
    if not isinstance(samples, SplitSamples):
        raise ConfigError(
            "a mixture or a stream has an order of its own",
            where="data.group_by_length",
            do="leave it out, or train on one prepared dataset",
        )
    packing = samples.split.packing
    if parse_packing(packing).kind == "full":
        raise ConfigError(
            f"with packing={packing} all sequences are equally long",
            where="data.group_by_length",
            do="leave it out, or prepare with data.packing=single::truncate_right",
        )
    return GroupedSamples(samples, batch, seed)
