"""Micro-batches of training samples, in an order that is a pure function of the position.

The trainer iterates `steps`; everything about where a run stands is one number. It must never
know about models or devices.
"""

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.data.dataset import Split
from penstock.data.order import permute
from penstock.errors import DataError

_AHEAD = 2
"""Steps prepared before they are asked for."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the host."""

    tokens: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64: the next token."""
    loss_weights: Tensor
    """(B, T) float32."""
    sequences: Tensor
    """(B,) int64: place of each sequence in the step's global batch."""


class Loader:
    """Cuts a split into global batches of `batch_size` sequences, `micro` at a time."""

    def __init__(
        self,
        split: Split,
        *,
        sequence_length: int,
        batch_size: int,
        micro: int,
        seed: int,
        shuffle: bool = True,
        limit: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """`limit` uses only that many samples of each epoch's order; `share` (which, of how many)
        takes only every so many micro-batches of each global batch, as one of several replicas.

        Raises:
            DataError: the split has not one whole sequence.
        """
        self.split = split
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.micro = micro
        self._seed = seed
        self._share = share
        self._shuffle = shuffle
        self._total = split.samples(sequence_length)
        if split.token_count < 2:
            raise DataError(
                f"split {split.name} has {split.token_count} tokens",
                where="data.split",
                do="use more text, or change data.splits",
            )
        self.samples: int = self._total if limit is None else min(limit, self._total)
        """Samples of one epoch."""

    def micro_batches(self, position: int) -> list[Batch]:
        """The step that starts at sample `position`, counted over all epochs; this share of it."""
        indices = self._indices(np.arange(position, position + self.batch_size))
        batches: list[Batch] = []
        which, count = self._share
        for first in range(which * self.micro, self.batch_size, count * self.micro):
            rows = [
                self.split.sample(int(index), self.sequence_length)
                for index in indices[first : first + self.micro]
            ]
            tokens, targets, weights = (
                torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)
            )
            places = torch.arange(first, first + len(rows))
            batches.append(Batch(tokens, targets, weights, places))
        return batches

    def _indices(
        self, positions: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    ) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Sample of the split for each position."""
        epochs, places = np.divmod(positions, self.samples)
        if not self._shuffle:
            return places
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = permute(places[chosen], self._total, self._seed, int(epoch))
        return result

    def steps(self, position: int) -> Generator[tuple[int, list[Batch]]]:
        """Yield (position after the step, its micro-batches) for ever, read ahead in a thread.

        Close the iterator to end the thread.
        """
        ready: queue.Queue[tuple[int, list[Batch]] | BaseException] = queue.Queue(_AHEAD)
        stop = threading.Event()

        def work() -> None:
            at = position
            try:
                while not stop.is_set():
                    item = (at + self.batch_size, self.micro_batches(at))
                    at += self.batch_size
                    _put(ready, item, stop)
            except BaseException as error:
                _put(ready, error, stop)

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            # Joined: a thread inside torch when the interpreter ends takes the process down.
            stop.set()
            thread.join()


def _put(
    ready: "queue.Queue[tuple[int, list[Batch]] | BaseException]",
    item: tuple[int, list[Batch]] | BaseException,
    stop: threading.Event,
) -> None:
    """Wait for room, unless nobody reads any more."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.2)
            return
        except queue.Full:
            continue
