"""Measure this machine's matrix products and memory once, and remember the figures.

The planner uses them for predictions, the trainer for MFU, `doctor` shows them. Torch is loaded
only when there is something to measure.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from penstock.compiler.fingerprint import torch_version
from penstock.config.folders import user_cache_folder
from penstock.files import atomic_write
from penstock.hardware.detect import gpus, memory_bytes, processor_name, usable_cores
from penstock.hardware.target import Target

_SIZE = {"cpu": 1536, "cuda": 8192}
"""Side of the square matrices."""
_REPEATS = 5
_LINK_SOURCE = "measured here: from one process to another, by gloo"


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Measured speeds of one device."""

    bf16_flops: float
    fp32_flops: float
    bandwidth_bytes_per_second: float
    link_bytes_per_second: float | None = None
    """From one process to another; None before `doctor` has measured it."""


def detected_target(device: str) -> Target:
    """This machine as a target; measures it in about a second on first use."""
    speeds = measured_speeds(device)
    name = gpus()[0][0] if device == "cuda" and gpus() else processor_name()
    memory = gpus()[0][1] if device == "cuda" and gpus() else memory_bytes()
    return Target(
        name=f"this machine ({name}, {usable_cores()} cores)" if device == "cpu" else name,
        device=device,
        memory_bytes=memory,
        peak_flops={"bf16": speeds.bf16_flops, "fp32": speeds.fp32_flops},
        bandwidth_bytes_per_second=speeds.bandwidth_bytes_per_second,
        link_bytes_per_second=speeds.link_bytes_per_second,
        fast_bf16=speeds.bf16_flops > 1.2 * speeds.fp32_flops,
        measured=True,
        sources={
            "memory_bytes": "the operating system",
            "peak_flops": "measured here: large matrix products",
            "bandwidth_bytes_per_second": "measured here: large copies, read and write counted",
            **({"link_bytes_per_second": _LINK_SOURCE} if speeds.link_bytes_per_second else {}),
        },
    )


def measured_speeds(device: str, *, again: bool = False) -> Speeds:
    """The device's speeds from the user's cache, or measured now; the link only with `again`.

    Other programs can only make it slower than it is: the best of all measurements is remembered.
    """
    path = _cache_path(device)
    before = _remembered(path)
    if before is not None and not again:
        return before
    speeds = _measure(device)
    if again:
        from penstock.compiler.link import link_bytes_per_second  # noqa: PLC0415 - loads torch

        speeds = dataclasses.replace(speeds, link_bytes_per_second=link_bytes_per_second())
    best = speeds if before is None else _best(before, speeds)
    atomic_write(path, json.dumps(dataclasses.asdict(best)))
    return speeds


def _remembered(path: Path) -> Speeds | None:
    """What was measured before; None when there is nothing, or nothing sensible."""
    try:
        value = json.loads(path.read_bytes())
        known = {name: figure for name, figure in value.items() if figure is not None}
        speeds = Speeds(**{name: float(figure) for name, figure in known.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    figures = [figure for figure in dataclasses.astuple(speeds) if figure is not None]
    return speeds if all(math.isfinite(figure) and figure > 0 for figure in figures) else None


def _best(first: Speeds, second: Speeds) -> Speeds:
    links = [s.link_bytes_per_second for s in (first, second) if s.link_bytes_per_second]
    return Speeds(
        bf16_flops=max(first.bf16_flops, second.bf16_flops),
        fp32_flops=max(first.fp32_flops, second.fp32_flops),
        bandwidth_bytes_per_second=max(
            first.bandwidth_bytes_per_second, second.bandwidth_bytes_per_second
        ),
        link_bytes_per_second=max(links, default=None),
    )


def _cache_path(device: str) -> Path:
    """One file per processor, number of cores and torch release."""
    identity = f"{device} {processor_name()} {usable_cores()} {gpus()} {torch_version()}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return user_cache_folder() / "probe" / f"{digest}.json"


def _measure(device: str) -> Speeds:
    """Best of several matrix products and copies: what the device can do when left alone."""
    import torch  # noqa: PLC0415 - planning from remembered figures never loads it

    size = _SIZE[device]

    def product(dtype: torch.dtype) -> float:
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(left)
        return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=out), device)

    source = torch.ones(1 << 25, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    seconds = _best_seconds(lambda: copy.copy_(source), device)
    return Speeds(product(torch.bfloat16), product(torch.float32), 2 * source.nbytes / seconds)


def _best_seconds(work: Callable[[], object], device: str) -> float:
    """Shortest of several runs after one to warm up."""
    import torch  # noqa: PLC0415 - as above

    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    work()
    best = float("inf")
    for _ in range(_REPEATS):
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best
