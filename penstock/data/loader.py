"""Micro-batches of training samples, read ahead of the step that needs them.

The trainer iterates `steps`; what comes in which order is `data/samples.py`'s. It must never know
about models or devices.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.data.grouping import GroupedSamples
from penstock.data.objective import Objective
from penstock.data.sample_log import SampleLog
from penstock.data.samples import Row, Samples
from penstock.data.stream_samples import StreamSamples
from penstock.errors import ConfigError

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
    """(B, T) int64, where the objective says what positions see; see `data/objective.py`."""


class LoadedStep(NamedTuple):
    """One optimizer step's samples."""

    position: int
    """Samples before the next step, over all epochs."""
    batches: list[Batch]
    tokens: int
    """Of the whole global batch, padding counted."""
    state: dict[str, Any]
    """What a checkpoint keeps besides the position, to go on after this step."""


class Loader:
    """Cuts samples into global batches of `batch_size` sequences, `micro` at a time."""

    def __init__(
        self,
        samples: Samples,
        *,
        sequence_length: int,
        batch_size: int,
        micro: int,
        objective: Objective | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Samples of `sequence_length` tokens; without an objective, the next token is predicted
        from all before it. `share` (which, of how many) takes only every so many micro-batches of
        each global batch, as one of several replicas.
        """
        self._objective = objective or Objective()
        self.samples = samples
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.micro = micro
        self._share = share
        self._has_own_lanes = isinstance(samples, StreamSamples) and samples.keep_share(
            micro, *share
        )
        self.log: SampleLog | None = None
        """Told of each step's samples when they are taken."""

    @property
    def epoch(self) -> int:
        """Samples of one epoch.

        Raises:
            ConfigError: there is no end to them.
        """
        if self.samples.count is None:
            raise ConfigError(
                "a stream of text has no epochs", where="train.epochs", do="set train.steps"
            )
        return self.samples.count

    def micro_batches(self, position: int) -> list[Batch]:
        """The step that starts at sample `position`, counted over all epochs; this share of it."""
        length = self._length(position)
        batches: list[Batch] = []
        for first, rows in self._own_rows(position):
            chosen = [self._objective.of(row, position + first + i) for i, row in enumerate(rows)]
            tokens, targets, weights, segments = (
                torch.from_numpy(np.stack(part)[:, :length]) for part in zip(*chosen, strict=True)
            )
            places = torch.arange(first, first + len(chosen))
            told = segments if self._objective.takes_segments else None
            batches.append(Batch(tokens, targets, weights, places, told))
        return batches

    def _length(self, position: int) -> int:
        """Tokens per sequence in the step that starts at a sample: where samples are grouped by
        length, all processes cut the step after its longest one.
        """
        if not isinstance(self.samples, GroupedSamples):
            return self.sequence_length
        return self.samples.longest(position, self.batch_size)

    def _own_rows(self, position: int) -> Iterator[tuple[int, list[Row]]]:
        """First place in the global batch, and rows, of each micro-batch of this share."""
        which, count = self._share
        places = range(which * self.micro, self.batch_size, count * self.micro)
        if self.samples.count is not None:
            for first in places:
                yield first, self.samples.rows(position + first, self.micro)
            return
        # A stream is read in its order: of all lanes, where they cannot be shared out.
        found = self.samples.rows(position, self.batch_size)
        for number, first in enumerate(places):
            start = number * self.micro if self._has_own_lanes else first
            yield first, found[start : start + self.micro]

    def steps(self, position: int) -> Generator[LoadedStep]:
        """Yield steps from sample `position` for ever, read ahead in a thread.

        Close the iterator to end the thread.
        """
        ready: queue.Queue[LoadedStep | BaseException] = queue.Queue(_AHEAD)
        stop = threading.Event()

        def work() -> None:
            at = position
            try:
                while not stop.is_set():
                    batches = self.micro_batches(at)
                    tokens = self.batch_size * self._length(at)
                    at += self.batch_size
                    _put(ready, LoadedStep(at, batches, tokens, self.samples.state()), stop)
            except BaseException as error:
                _put(ready, error, stop)

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                if self.log is not None:
                    parts = item.batches
                    self.log.write(
                        item.position - self.batch_size,
                        [part.sequences for part in parts],
                        [part.tokens for part in parts],
                    )
                yield item
        finally:
            # Joined: a thread inside torch when the interpreter ends takes the process down.
            stop.set()
            thread.join()
            self.samples.close()


def _put(
    ready: "queue.Queue[LoadedStep | BaseException]",
    item: LoadedStep | BaseException,
    stop: threading.Event,
) -> None:
    """Wait for room, unless nobody reads any more."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.2)
            return
        except queue.Full:
            continue
