"""What a run measures: the metrics file, TensorBoard, throughput and memory.

The trainer logs through here; the report reads `metrics.jsonl` back. It must never know how the
numbers came about.
"""

import json
import math
import re
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from penstock.console import get_console
from penstock.errors import CheckpointError
from penstock.files import LineLog, atomic_write, whole_records
from penstock.training.board import Board

_RECENT = 50
"""Steps the shown speed is the median of."""


class MetricsLog:
    """Appends one JSON object per line to metrics.jsonl, and to TensorBoard."""

    def __init__(self, path: Path, *, resume_step: int, tensorboard: Path | None) -> None:
        """Keep lines up to `resume_step`: later ones belong to steps that will be done again.

        Raises:
            CheckpointError: the files cannot be written.
        """
        self._path = path
        self._resume_step = resume_step
        self._board: Board | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _truncate(path, resume_step)
            self._lines = LineLog(path)
            if tensorboard is not None:
                self._board = Board(tensorboard, resume_step=resume_step)
        except OSError as error:
            raise self._unwritable(error) from error
        self._known = {name for record in kept if record["step"] == resume_step for name in record}

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write one record; numbers that are not finite become null.

        What the file already says about the step a run resumed from is not said twice. What the
        disk has no room for is written later, and it says so; TensorBoard does without it.
        """
        if step <= self._resume_step:
            values = {name: value for name, value in values.items() if name not in self._known}
            if not values:
                return
        record = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._say(self._lines.append(json.dumps(record)))
        if self._board is not None:
            self._board.log(step, record)

    def sync(self, *, last: bool = False) -> None:
        """Make all lines safe from a power cut, as a checkpoint is: call it before saving one.

        Raises:
            CheckpointError: at the `last` call, there is no room for some.
        """
        try:
            self._lines.sync()
        except OSError as error:
            if last:
                raise self._unwritable(error) from error
            self._say(self._lines.untold(error))

    def close(self) -> None:
        """Write out what is buffered; closing twice is fine."""
        self._lines.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _say(self, why: str | None) -> None:
        if why is not None:
            get_console().warning(f"{self._path} waits for room: {why}; training goes on")

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the metrics could not be written: {error.strerror or error}",
            where=str(self._path),
            do="make room and start again with the same command",
        )


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """A value as JSON has it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop records after `step` and torn lines; returns the records left."""
    records = [record for record in read_metrics(path) if record["step"] <= step]
    content = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    if not path.is_file() or path.read_bytes() != content:
        atomic_write(path, content)
    return records


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics.jsonl; none when there is no file."""
    return whole_records(path, "step")


class Throughput:
    """Tokens per second and model-FLOPs utilization of the steps after a warm-up.

    Only time inside steps counts, so validation and checkpoints do not; nor do the first
    `warmup_steps`.
    """

    def __init__(
        self,
        *,
        warmup_steps: int,
        flops_per_token: int,
        peak_flops: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`peak_flops`: FLOP/s this device was measured at, for `mfu`."""
        self._warmup_steps = warmup_steps
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self._started = 0.0
        self._steps = 0
        self._tokens_per_step = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.step_seconds: float | None = None
        """Duration of the last step."""
        self.data_seconds: float | None = None
        """What the last step waited for its samples."""
        self.counted_waiting = 0.0
        """The same over all steps after the warm-up."""
        self.counted_tokens = 0
        """Tokens of all steps after the warm-up."""
        self.counted_seconds = 0.0
        """Time of all steps after the warm-up."""

    def start(self) -> None:
        """A step begins."""
        self._started = self._clock()

    def data_ready(self) -> None:
        """The step's samples are there."""
        self.data_seconds = self._clock() - self._started

    def stop(self, tokens: int) -> float:
        """The step has ended; returns its seconds."""
        self.step_seconds = self._clock() - self._started
        self._steps += 1
        self._tokens_per_step = tokens
        if self._steps > self._warmup_steps:
            self._recent.append(self.step_seconds)
            self.counted_tokens += tokens
            self.counted_seconds += self.step_seconds
            self.counted_waiting += self.data_seconds or 0.0
        return self.step_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Of the recent steps after the warm-up, by their median; None before."""
        if not self._recent:
            return None
        return self._tokens_per_step / max(statistics.median(self._recent), 1e-12)

    @property
    def mean_tokens_per_second(self) -> float | None:
        """Over all steps after the warm-up; None before."""
        if self.counted_seconds == 0:
            return None
        return self.counted_tokens / self.counted_seconds

    @property
    def waiting_share(self) -> float | None:
        """Part of all steps' time after the warm-up spent waiting for samples; None before."""
        return self.counted_waiting / self.counted_seconds if self.counted_seconds else None

    @property
    def mfu(self) -> float | None:
        """Share of the peak FLOP/s, 0 to 1 (PaLM, arXiv 2204.02311, appendix B); None before."""
        return self._share_of_peak(self.tokens_per_second)

    @property
    def mean_mfu(self) -> float | None:
        """The same over all steps after the warm-up."""
        return self._share_of_peak(self.mean_tokens_per_second)

    def _share_of_peak(self, speed: float | None) -> float | None:
        return None if speed is None else speed * self._flops_per_token / self._peak_flops

    def remaining_seconds(self, steps: int) -> float | None:
        """Time that many more steps will take, by the median of the recent ones; None before."""
        return steps * statistics.median(self._recent) if self._recent else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: of the GPU's allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far.

    The kernel's own mark of this address space (proc(5), VmHWM) where there is one: getrusage
    starts a new program at the size of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        mark = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text("ascii"), re.MULTILINE)
        if mark is not None:
            return int(mark[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
