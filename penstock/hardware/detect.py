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
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


@functools.cache
def memory_bytes() -> int:
    """Main memory this process may use: the machine's, or less where its control group says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = control_group_limit(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return total if limit is None else min(total, limit)


def free_memory_bytes(facts: Path = Path("/proc/meminfo")) -> int | None:
    """Main memory nobody uses now, or only as a cache of files; None where nobody says."""
    for line in _lines(facts):
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[:1]:
            return int(value.split()[0]) << 10
    return None


def control_group_limit(mount: Path, membership: Path) -> int | None:
    """Smallest memory limit, in bytes, of the control groups a process is in; None without one.

    `mount` is where the hierarchy is, `membership` lists the groups as /proc/PID/cgroup does. A
    group is bound by those above it too. Inside a container the group's own path may not exist
    under the mount; the mount's root then is the group.
    """
    limits: list[int] = []
    for line in _lines(membership):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = mount if not controllers else mount / "memory"
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = root / path.strip().lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                limits += [int(text) for text in _lines(folder / name) if text.strip().isdigit()]
    return min(limits, default=None)


def _lines(path: Path) -> list[str]:
    """A text file's lines; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


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
    return parse_gpus(result.stdout)


def parse_gpus(listing: str) -> tuple[tuple[str, int], ...]:
    """(name, memory in bytes) from nvidia-smi's lines of "name, MiB"; others are passed over."""
    found: list[tuple[str, int]] = []
    for line in listing.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            found.append((name.strip(), int(mebibytes) << 20))
    return tuple(found)
