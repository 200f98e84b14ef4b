"""What this machine is: processor, cores, memory, GPUs.

The planner and `doctor` use it. It must never import torch; speeds come from
`compiler/probe.py`, which has measured them once.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path


@functools.cache
def processor_name() -> str:
    """Model name as /proc/cpuinfo gives it, or the platform's machine name."""
    return _cpuinfo("model name") or os.uname().machine


@functools.cache
def processor_flags() -> frozenset[str]:
    """Instruction-set features as /proc/cpuinfo names them."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def _cpuinfo(key: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


@functools.cache
def memory_bytes() -> int:
    """Main memory this process may use: the smaller of the machine's and the control group's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return total


@functools.cache
def gpus() -> tuple[tuple[str, int], ...]:
    """(name, memory in bytes) of each NVIDIA GPU the driver shows; empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603 - a fixed command
    except (OSError, subprocess.SubprocessError):
        return ()
    found: list[tuple[str, int]] = []
    for line in result.stdout.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            found.append((name.strip(), int(mebibytes) << 20))
    return tuple(found)
