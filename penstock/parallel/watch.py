"""Which of the processes is silent, which is slow, and where a silent one stands.

`world.py` calls it around and after steps. It must never know what a step does.
"""

import contextlib
import datetime
import faulthandler
import statistics
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_ROLL_CALL_SECONDS = 3.0
"""From the first process that gives up to the last: they began to wait almost together."""
_EARLY = 0.9
"""Share of the longest wait after which a process that has not ended a step says where it stands:
before the others give it up and have it ended."""
_STEPS, _SLOW = 20, 1.5
"""Steps whose mean is compared, and how much more than the others' a slow one needs."""


class Watchdog:
    """Leaves the stacks of all threads in a file when a process makes no step for long.

    Python's faulthandler writes them from a thread of its own, also when all others are stuck.
    """

    def __init__(self, folder: Path, rank: int, timeout_seconds: float) -> None:
        """Nothing is written, and no file made, before `__enter__`."""
        self._path = folder / f"rank-{rank:05}.txt"
        self._seconds = _EARLY * timeout_seconds

    def __enter__(self) -> "Watchdog":
        """Open the file; where that is impossible, stacks go to standard error."""
        self._file = None
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching; a file in which nothing was written is taken away."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            with contextlib.suppress(OSError):
                if self._path.stat().st_size == 0:
                    self._path.unlink()
                    self._path.parent.rmdir()

    def rearm(self) -> None:
        """A step has ended: the next may take as long."""
        more: dict[str, Any] = {} if self._file is None else {"file": self._file}
        faulthandler.dump_traceback_later(self._seconds, **more)

    def dump(self) -> str:
        """Write where all threads stand now; returns where that can be read."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is None:
            faulthandler.dump_traceback()
            return "standard error"
        faulthandler.dump_traceback(self._file)
        return str(self._path)


def absent(store: Any, rank: int, size: int, token: str) -> list[int]:  # noqa: ANN401 - torch's
    """Ranks that do not answer a roll call among those whose collective timed out.

    Args:
        store: torch's key-value store of the job.
        rank: who asks.
        size: how many there are.
        token: equal in all processes of one start of the job.
    """
    with contextlib.suppress(RuntimeError):
        store.set_timeout(datetime.timedelta(seconds=_ROLL_CALL_SECONDS))
        store.set(f"{token}/present/{rank}", "1")
        time.sleep(_ROLL_CALL_SECONDS)
        return [r for r in range(size) if not store.check([f"{token}/present/{r}"])]
    return []


class Pace:
    """How long each process works in a step, less what it waits for the others.

    Waiting is counted in the sums of gradients and figures. What torch's FSDP2 gathers and sums
    inside the model is not, nor what a GPU does by itself: there a slow process holds up all alike.
    """

    def __init__(self, size: int) -> None:
        """`size`: processes."""
        self.waited = 0.0
        """Seconds since the last step ended."""
        self._ended: float | None = None
        self._seconds = [0.0] * size
        self._steps = 0
        self._named: int | None = None

    def own_seconds(self) -> float:
        """Of the step that ends now; 0 for the first, which begins with compiling and reading."""
        now, waited = time.perf_counter(), self.waited
        before, self._ended, self.waited = self._ended, now, 0.0
        return 0.0 if before is None else max(0.0, now - before - waited)

    def straggler(self, seconds: list[float]) -> str | None:
        """Take in every process's own seconds; what to say of one that has become slow.

        The mean of 20 steps is compared, and a process is named once until another is slower.
        """
        self._seconds = [sum(pair) for pair in zip(self._seconds, seconds, strict=True)]
        self._steps += 1
        if self._steps < _STEPS:
            return None
        means, self._seconds = [s / self._steps for s in self._seconds], [0.0] * len(seconds)
        self._steps = 0
        slowest = max(range(len(means)), key=means.__getitem__)
        usual = statistics.median(means[:slowest] + means[slowest + 1 :])
        if means[slowest] < _SLOW * usual:
            self._named = None
            return None
        if slowest == self._named:
            return None
        self._named = slowest
        return (
            f"rank {slowest} is slow: {means[slowest]:.3g} s of its own work a step, "
            f"the others {usual:.3g} s, and they wait for it"
        )
