"""Torch's profiler around a stretch of work, with Penstock's own marks, and its trace read.

`profiling/session.py` records with it. It must never know what the work is.
"""

import contextlib
import json
import os
from collections.abc import Callable, Generator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from penstock.profiling.marks import marked_collectives
from penstock.profiling.trace import Times, read_times
from penstock.spans import recording


@contextlib.contextmanager
def recorded(path: Path, device: str) -> Generator[Callable[[], tuple[Times, bytes]]]:
    """Record everything inside; what it gives then reads the recording."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device == "cuda" else []
    profiler = profile(activities=activities, profile_memory=True)

    def finish() -> tuple[Times, bytes]:
        profiler.export_chrome_trace(str(path))
        trace = path.read_bytes()
        return read_times(json.loads(trace)), trace

    with _silenced():
        profiler.__enter__()
    try:
        with recording(record_function), marked_collectives():
            yield finish
    finally:
        with _silenced():
            profiler.__exit__(None, None, None)


@contextlib.contextmanager
def _silenced() -> Generator[None]:
    """Without standard error: torch's profiler announces itself there, past every setting."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
