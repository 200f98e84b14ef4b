"""One measured command: its output with times, its duration, the peak memory of its processes.

`bench/runner.py` calls it. It knows nothing of metrics or variants.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from penstock.errors import BenchmarkError
from penstock.files import atomic_write

_SAMPLE_SECONDS = 0.02
"""Between looks at the processes' memory and at watched files."""
_SHOWN_LINES, _SHOWN_CHARACTERS = 3, 300
"""End of what a failing command said, as it is shown in the message."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """A text whose first appearance is timed."""

    pattern: str
    """Regular expression, searched line by line."""
    file: Path | None
    """Where it appears; None: in the output."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A command that succeeded."""

    output: str
    """Standard output and standard error, line by line as they came."""
    stdout: str
    wall_seconds: float
    peak_memory_bytes: int
    """Most resident memory of the command and its descendants together, as sampled; 0 where
    the system does not tell."""
    first_seen: dict[Watch, float]
    """Seconds from the start to each watched text that appeared."""


def run_command(
    words: Sequence[str],
    *,
    environment: Mapping[str, str],
    timeout_seconds: float,
    log: Path,
    watches: Sequence[Watch] = (),
) -> Finished:
    """Run a command to its end; its output is kept in `log`.

    Nothing it started is left running, also when this is interrupted.

    Raises:
        BenchmarkError: it cannot be started, failed, or took too long.
    """
    started = time.perf_counter()
    try:
        process = subprocess.Popen(  # noqa: S603 - running the user's commands is the job
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    except OSError as error:
        raise BenchmarkError(
            f"the command cannot be started: {error.strerror}: {shlex.join(words)}"
        ) from None
    observer = _Observer(process, started, watches)
    # `wait(timeout)` looks every 50 ms only; this way the end is noticed when it comes.
    timer = threading.Timer(timeout_seconds, _end, (process.pid,))
    timer.start()
    try:
        code = process.wait()
        seconds = time.perf_counter() - started
    finally:
        timer.cancel()
        _end(process.pid)
        process.wait()
        observer.finish()
        atomic_write(log, observer.output())
    if code and seconds >= timeout_seconds:
        raise BenchmarkError(
            f"the command took longer than {timeout_seconds:g} s: {shlex.join(words)}",
            where=str(log),
            do="raise timeout_seconds, or make the work smaller",
        )
    if code:
        # What went wrong is on standard error; a program that uses only the other is not left out.
        said = observer.output(2).strip() or observer.output()
        raise BenchmarkError(_failure(words, code, said), where=str(log))
    return Finished(
        observer.output(),
        observer.output(1),
        seconds,
        observer.peak_memory_bytes,
        observer.first_seen,
    )


def _failure(words: Sequence[str], code: int, output: str) -> str:
    """What is told of a command that failed: how, and the end of what it said."""
    reason = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    end = " ".join(" ".join(output.splitlines()[-_SHOWN_LINES:]).split())
    end = end if len(end) <= _SHOWN_CHARACTERS else f"…{end[-_SHOWN_CHARACTERS:]}"
    return f"the command failed with {reason}: {end or 'it printed nothing'} [{shlex.join(words)}]"


def _end(group: int) -> None:
    """End a command and what it left running in its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


class _Observer:
    """Reads a command's output and watches its processes while it runs."""

    def __init__(
        self, process: subprocess.Popen[bytes], started: float, watches: Sequence[Watch]
    ) -> None:
        self.peak_memory_bytes = 0
        self.first_seen: dict[Watch, float] = {}
        self._pid = process.pid
        self._started = started
        self._watches = [(watch, re.compile(watch.pattern)) for watch in watches]
        self._lines: list[tuple[int, str]] = []
        self._stopped = threading.Event()
        pipes: list[tuple[int, IO[bytes] | None]] = [(1, process.stdout), (2, process.stderr)]
        self._threads = [
            threading.Thread(target=self._read, args=(number, pipe), daemon=True)
            for number, pipe in pipes
        ]
        self._threads.append(threading.Thread(target=self._sample, daemon=True))
        for thread in self._threads:
            thread.start()

    def output(self, stream: int | None = None) -> str:
        """Everything printed so far, or only what went to one stream (1 or 2)."""
        return "".join(text for number, text in self._lines if stream in (None, number))

    def finish(self) -> None:
        """Wait for the last of the output."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _read(self, number: int, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                now = time.perf_counter() - self._started
                text = line.decode(errors="replace")
                self._lines.append((number, text))
                for watch, pattern in self._watches:
                    if watch.file is None and pattern.search(text):
                        self.first_seen.setdefault(watch, now)

    def _sample(self) -> None:
        while not self._stopped.is_set():
            self.peak_memory_bytes = max(self.peak_memory_bytes, _memory_bytes(self._pid))
            for watch, pattern in self._watches:
                if watch.file is not None and watch not in self.first_seen:
                    self._look(watch, watch.file, pattern)
            self._stopped.wait(_SAMPLE_SECONDS)

    def _look(self, watch: Watch, file: Path, pattern: re.Pattern[str]) -> None:
        with contextlib.suppress(OSError):
            if pattern.search(file.read_text(encoding="utf-8", errors="replace")):
                self.first_seen[watch] = time.perf_counter() - self._started


def _memory_bytes(root: int) -> int:
    """Resident memory of a process and its descendants now, or one's own largest where that is
    more: the kernel marks it between our looks (proc(5), VmRSS and VmHWM).
    """
    together, largest = 0, 0
    waiting = [root]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            status = (folder / "status").read_text(encoding="ascii", errors="replace")
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text(encoding="ascii").split())
        except OSError:
            continue
        marks = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB$", status, re.MULTILINE))
        together += int(marks.get("VmRSS", 0)) * 1024
        largest = max(largest, int(marks.get("VmHWM", 0)) * 1024)
    return max(together, largest)
