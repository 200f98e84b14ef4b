"""Samples of a stream of text by position, made in the background, window by window.

`data/streaming.py` makes them of a source. Samples come from lanes, each going through its own
shards, and are shuffled within windows of each lane. Which sample stands at which position depends
on the text and the settings alone; a checkpoint holds where each lane's window begins, so that
going on makes no more than that window again. It must never know about models or batches.
"""

import concurrent.futures
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from penstock.data.formats.sequence import TokenSequence
from penstock.data.order import permute
from penstock.data.samples import Row
from penstock.data.stream_rows import Cursor, StreamRow, StreamText, rows_from
from penstock.errors import CheckpointError


class _Window:
    """Rows of one lane that are shuffled among themselves."""

    def __init__(self, start: Cursor, rows: Sequence[StreamRow]) -> None:
        self.start = start
        self.rows = rows

    @property
    def after(self) -> Cursor:
        """Where the next window begins."""
        return self.rows[-1].after


class _Lane:
    """One lane's windows; the next is made while the present one is used."""

    def __init__(
        self,
        number: int,
        text: StreamText,
        lanes: int,
        size: int,
        pool: concurrent.futures.ThreadPoolExecutor,
    ) -> None:
        self._number, self._text, self._lanes, self._size = number, text, lanes, size
        self._pool = pool
        self._next: concurrent.futures.Future[_Window] | None = None
        self._rows: Iterator[StreamRow] = iter(())
        self._window: _Window | None = None
        self._index = -1
        self.begin(Cursor(number, 0, 0), 0)

    def begin(self, start: Cursor, window: int) -> None:
        """Go to a window whose first row is at `start`."""
        self._rows = rows_from(self._text, start, self._lanes)
        self._start, self._index, self._window = start, window, None
        self._next = None

    def prepare(self) -> None:
        """See to it that the window asked for next is being made."""
        if self._next is None:
            start = self._start if self._window is None else self._window.after
            self._next = self._pool.submit(self._make, start)

    def row(self, number: int) -> TokenSequence:
        """The lane's sample `number`; numbers may stay in a window or go on to the next."""
        window, place = divmod(number, self._size)
        if self._window is None or window == self._index + 1:
            self.prepare()
            if self._next is None:
                raise AssertionError
            self._window, self._index, self._next = self._next.result(), window, None
            self.prepare()
        order = self._index * self._lanes + self._number
        place = int(permute(np.array([place]), self._size, self._text.seed, order)[0])
        return self._window.rows[place].sequence

    def start_of(self, window: int) -> Cursor:
        """Where a window begins: the present one or the next."""
        if self._window is None or window == self._index:
            return self._start if self._window is None else self._window.start
        return self._window.after

    def _make(self, start: Cursor) -> _Window:
        return _Window(start, [next(self._rows) for _ in range(self._size)])


class StreamSamples:
    """Samples by position: of lane `position` mod lanes, the sample `position` div lanes."""

    count = None
    """There is no end to them."""

    def __init__(
        self,
        text: StreamText,
        identity: str,
        *,
        lanes: int,
        buffer: int,
    ) -> None:
        """`buffer`: sequences of all lanes that are shuffled among each other. `identity` names
        everything samples depend on.
        """
        self._text, self._identity = text, identity
        self._size = max(1, buffer // lanes)
        self._lane_count = lanes
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "stream")
        self._lanes = {
            number: _Lane(number, text, lanes, self._size, self._pool) for number in range(lanes)
        }
        self._position = 0

    def keep_share(self, micro: int, which: int, count: int) -> bool:
        """Leave out the lanes of others, where `count` replicas take micro-batches of `micro`
        samples in turns; returns whether that is possible: each lane must be one replica's.
        """
        if self._lane_count % (micro * count):
            return False
        lanes = self._lanes.items()
        self._lanes = {n: lane for n, lane in lanes if n // micro % count == which}
        return True

    def rows(self, position: int, count: int) -> list[Row]:
        """Those of `count` samples from `position` on whose lanes are kept: samples before must
        have been taken, in this process or by `resume`.

        Raises:
            DataError: text that cannot be read.
        """
        if position == self._position:
            for lane in self._lanes.values():
                lane.prepare()
        places = (divmod(p, self._lane_count) for p in range(position, position + count))
        found = [
            padded_row(self._lanes[lane].row(number), self._text)
            for number, lane in places
            if lane in self._lanes
        ]
        self._position = position + count
        return found

    def state(self) -> dict[str, Any]:
        """What the samples depend on, where the window of each lane kept begins, and what was left
        out of the parts of the text that this process has finished.
        """
        cursors = {
            str(number): list(lane.start_of(self._window_of(number)))
            for number, lane in self._lanes.items()
        }
        left_out = self._text.left_out.counts()
        return {"stream": {"identity": self._identity, "cursors": cursors, "left_out": left_out}}

    def resume(self, state: Mapping[str, Any], position: int) -> None:
        """Go on where a checkpoint left off: each lane makes its window again.

        Raises:
            CheckpointError: damaged, or of another source, tokenizer or setting.
        """
        found = state.get("stream")
        if not isinstance(found, dict) or found.get("identity") != self._identity:
            raise CheckpointError(
                "the run was trained on another stream: its source, its tokenizer or its settings "
                "have changed",
                where="data.streaming",
                do="give the same source, splits, packing, lanes and buffer, or another run folder",
            )
        self._position = position
        try:
            self._text.left_out.go_on(found.get("left_out", {}))
            for number, lane in self._lanes.items():
                shard, piece, offset = map(int, found["cursors"][str(number)])
                lane.begin(Cursor(shard, piece, offset), self._window_of(number))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CheckpointError(
                "the checkpoint's place in the stream is damaged",
                where="run",
                do="restore it from a copy",
            ) from None

    def drawn(self, position: int) -> dict[str, int]:
        """Nothing: there is one stream."""
        return {}

    def close(self) -> None:
        """End the thread, after what it is doing."""
        self._pool.shutdown(cancel_futures=True)

    def _window_of(self, lane: int) -> int:
        """The window that holds a lane's next sample."""
        done = max(0, -(-(self._position - lane) // self._lane_count))
        return done // self._size


def padded_row(sequence: TokenSequence, text: StreamText) -> Row:
    """Inputs, targets and weights, padded with end-of-text at weight 0."""
    length, count = text.sequence_length, len(sequence.tokens)
    tokens = np.full(length + 1, text.end_of_text, np.int64)
    tokens[:count] = sequence.tokens
    weights = np.zeros(length, np.float32)
    weights[: max(0, count - 1)] = 1 if sequence.weights is None else sequence.weights[1:]
    return Row(tokens[:-1], tokens[1:], weights, min(count, length))
