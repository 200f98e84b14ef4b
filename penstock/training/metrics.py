"""What a run measures: the metrics file, TensorBoard, throughput and memory.

The trainer logs through here; the report reads `metrics.jsonl` back. It must never know how the
numbers came about.
"""

import json
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

import torch

_RECENT = 50
"""Steps the shown speed is the median of."""


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Appends one JSON object per line to metrics.jsonl, and to TensorBoard."""

    def __init__(self, path: Path, *, resume_step: int, tensorboard: Path | None) -> None:
        """Keep lines up to `resume_step`: later ones belong to steps that will be done again."""
        _truncate(path, resume_step)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._board: _Writer | None = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - heavy, optional

            self._board = SummaryWriter(str(tensorboard), purge_step=resume_step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write one record; numbers that are not finite become null."""
        record = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, step: int) -> None:
    """Drop records after `step`, and a last line that was cut off."""
    kept = [json.dumps(record) for record in read_metrics(path) if record["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics.jsonl; none when there is no file."""
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


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
        self.counted_tokens = 0
        """Tokens of all steps after the warm-up."""
        self.counted_seconds = 0.0
        """Time of all steps after the warm-up."""

    def start(self) -> None:
        """A step begins."""
        self._started = self._clock()

    def stop(self, tokens: int) -> float:
        """The step has ended; returns its seconds."""
        self.step_seconds = self._clock() - self._started
        self._steps += 1
        self._tokens_per_step = tokens
        if self._steps > self._warmup_steps:
            self._recent.append(self.step_seconds)
            self.counted_tokens += tokens
            self.counted_seconds += self.step_seconds
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
    def mfu(self) -> float | None:
        """Share of the peak FLOP/s, 0 to 1 (PaLM, arXiv 2204.02311, appendix B); None before."""
        speed = self.tokens_per_second
        return None if speed is None else speed * self._flops_per_token / self._peak_flops


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: of the GPU's allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
