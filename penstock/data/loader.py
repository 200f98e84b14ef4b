"""Micro-batches of training samples, in an order that is a pure function of the position.

The trainer iterates `steps`; everything about where a run stands is one number. It must never
know about models or devices.
"""

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.data.dataset import Split
from penstock.data.masking import Masking
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
    """(B, T) int64: the next token, or where tokens are masked the token itself."""
    loss_weights: Tensor
    """(B, T) float32."""
    sequences: Tensor
    """(B,) int64: place of each sequence in the step's global batch."""
    segments: Tensor | None = None
    """(B, T) int64, where attention is confined: equal numbers see each other, padding has -1."""


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
        by_document: bool = False,
        masking: Masking | None = None,
    ) -> None:
        """`limit` uses only that many samples of each epoch's order.

        `by_document` gives every document a segment of its own, and weight 0 to what would be
        predicted from another one; `masking` has masked tokens predicted instead of the next.

        Raises:
            DataError: the split has not one whole sequence.
        """
        self.split = split
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.micro = micro
        self._seed = seed
        self._shuffle = shuffle
        self._by_document = by_document
        self._masking = masking
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
        """The step that starts at sample `position`, counted over all epochs."""
        positions = np.arange(position, position + self.batch_size)
        rows = [self._row(*pair) for pair in zip(self._indices(positions), positions, strict=True)]
        batches: list[Batch] = []
        for first in range(0, self.batch_size, self.micro):
            chosen = rows[first : first + self.micro]
            tokens, targets, weights, segments = (
                torch.from_numpy(np.stack(part)) for part in zip(*chosen, strict=True)
            )
            places = torch.arange(first, first + len(chosen))
            confined = segments if self._by_document or self._masking else None
            batches.append(Batch(tokens, targets, weights, places, confined))
        return batches

    def _row(self, index: np.int64, position: np.int64) -> tuple[NDArray[Any], ...]:
        """Inputs, targets, loss weights and segments (T,) of one sample of the split."""
        tokens, targets, weights = self.split.sample(int(index), self.sequence_length)
        length = self.split.length(int(index), self.sequence_length)
        segments = segments_of(
            tokens, length, self.split.end_of_text if self._by_document else None
        )
        if self._masking is not None:
            inputs, weights = self._masking.mask(tokens, length, int(position))
            return inputs, tokens, weights, segments
        if self._by_document:
            weights = np.where(tokens == self.split.end_of_text, np.float32(0), weights)
        return tokens, targets, weights, segments

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


def segments_of(
    tokens: NDArray[np.int64], length: int, end_of_text: int | None
) -> NDArray[np.int64]:
    """Numbers (T,) int64 of the documents of `length` tokens, and -1 for the padding after them.

    A document ends with its end-of-text token, as in Megatron-LM's `reset_attention_mask`; None:
    all is one document.
    """
    segments = np.zeros(len(tokens), np.int64)
    if end_of_text is not None:
        segments[1:] = np.cumsum(tokens[:-1] == end_of_text)
    segments[length:] = -1
    return segments


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
