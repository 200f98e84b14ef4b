"""Process-wide settings that must be in place before torch is imported.

`cli.py` and worker processes call `prepare_process`; `doctor` shows `process_report`. It must
never import torch.
"""

import ctypes
import os
import re
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""mallopt parameters (malloc.h)."""
_KEEP_BYTES = 1 << 30
"""glibc keeps freed memory up to this instead of returning it to the kernel: training frees and
allocates the same large buffers every step, and each round trip costs page faults."""

_OPENMP = re.compile(r"/lib(?:gomp|iomp5|omp5?)(?:-[0-9a-f]+)?\.so[^/]*$")
"""File names of OpenMP runtimes, with the digest that wheels add; not those of Open MPI."""
_applied: list[str] = []


def prepare_process() -> None:
    """Set the allocator, once."""
    if _applied:
        return
    _applied.append(_keep_freed_memory())


def quiet_profiler() -> None:
    """Keep what recording warns of in C++ off the terminal; only before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _keep_freed_memory() -> str:
    """Tell glibc to keep large freed buffers; says what was done."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return "not glibc: left alone"
    accepted = all(
        mallopt(parameter, value)
        for parameter, value in (
            (_M_MMAP_THRESHOLD, _KEEP_BYTES),
            (_M_TRIM_THRESHOLD, _KEEP_BYTES),
            (_M_TOP_PAD, 64 << 20),
        )
    )
    return "freed memory is kept" if accepted else "glibc refused the settings"


def loaded_openmp() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process; more than one is a fault."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    return sorted(path for path in paths if is_openmp(path))


def is_openmp(path: str) -> bool:
    """Whether a shared library is an OpenMP runtime, by its name."""
    return _OPENMP.search(path) is not None


def process_report() -> dict[str, str]:
    """What was set, for `doctor` and the run's summary."""
    return {
        "allocator": _applied[0] if _applied else "not set",
        "openmp": ", ".join(Path(p).name for p in loaded_openmp()) or "none loaded yet",
        "threads": os.environ.get("OMP_NUM_THREADS", "one per core"),
    }
