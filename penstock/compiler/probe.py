"""Measure this machine's matrix products and memory once, and remember the figures.

The planner uses them for predictions, the trainer for MFU, `doctor` shows them. Torch is loaded
only when there is something to measure.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from penstock.compiler import operators
from penstock.compiler.fingerprint import torch_version
from penstock.config.folders import user_cache_folder
from penstock.files import atomic_write
from penstock.hardware.detect import gpus, memory_bytes, processor_name, usable_cores
from penstock.hardware.target import Target

_SIZE = {"cpu": 1536, "cuda": 8192}
"""Side of the square matrices."""
_ROWS, _WIDTH = {"cpu": 2048, "cuda": 8192}, {"cpu": 768, "cuda": 4096}
"""Tokens, and width, of a block whose widest products are measured."""
_REPEATS = 5
_LOOP_VALUES, _LOOP_CALLS = 1 << 16, 32
"""Values of which logistic functions are computed on a CPU, so few that they lie in its caches."""
_LOOP_FLOPS = 15.0
"""FLOPs that one of them counts for: fitted to the loops of GPT-2 124M's kernels on two cores of a
Xeon with AMX, which run at 0.12e+12 (docs/plan.md)."""
_OWN_PRODUCTS = (1.0, 1.15, 1.7)
"""As fast as the library's, alone and in hot caches, are products of our own inside a kernel, on a
matrix unit (`compiler/operators.py`): a layer's, and those of its gradients of inputs and of
weights; 2048 x 768 x 3072, two cores of a Xeon with AMX."""
_LOOPS_SOURCE = "measured here: exponentials and quotients of vectors in the cache"
_LINK_SOURCE = "measured here: from one process to another, by gloo"


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Measured speeds of one device."""

    bf16_flops: float
    fp32_flops: float
    bandwidth_bytes_per_second: float
    link_bytes_per_second: float | None = None
    """From one process to another; None before `doctor` has measured it."""
    bf16_products_flops: float | None = None
    """Of a block's widest product, its gradient of inputs and that of weights together."""
    fp32_products_flops: float | None = None
    loops_flops: float | None = None
    """In whose place arithmetic between products runs."""

    @property
    def products_flops(self) -> dict[str, float]:
        """By compute format."""
        both = {"bf16": self.bf16_products_flops, "fp32": self.fp32_products_flops}
        return {name: speed for name, speed in both.items() if speed is not None}


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
        products_flops=speeds.products_flops,
        loops_flops=speeds.loops_flops,
        bandwidth_bytes_per_second=speeds.bandwidth_bytes_per_second,
        link_bytes_per_second=speeds.link_bytes_per_second,
        fast_bf16=speeds.bf16_flops > 1.2 * speeds.fp32_flops,
        measured=True,
        own_operators=device == "cpu" and operators.available(),
        own_products=device == "cpu" and operators.available() and operators.has_unit(),
        sources={
            "memory_bytes": "the operating system",
            "peak_flops": "measured here: large matrix products",
            "products_flops": "measured here: a block's widest product, forward and backward",
            **({"loops_flops": _LOOPS_SOURCE} if speeds.loops_flops else {}),
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
    one, other = dataclasses.asdict(first), dataclasses.asdict(second)
    known = {name: [x for x in (one[name], other[name]) if x is not None] for name in one}
    return Speeds(**{name: max(figures) for name, figures in known.items() if figures})


def _cache_path(device: str) -> Path:
    """One file per processor, number of cores and torch release, and what is measured."""
    identity = f"4 {device} {processor_name()} {usable_cores()} {gpus()} {torch_version()}"
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

    def widest(dtype: torch.dtype) -> float:
        """A linear layer's product and both of its gradients, as they lie in memory."""
        rows, width = _ROWS[device], _WIDTH[device]
        x, weight, gradient = (
            torch.ones(shape, dtype=dtype, device=device)
            for shape in ((rows, width), (4 * width, width), (rows, 4 * width))
        )
        products = ((x, weight.t()), (gradient, weight), (gradient.t(), x))
        seconds = [
            _best_seconds(functools.partial(torch.mm, left, right), device)
            for left, right in products
        ]
        if dtype == torch.bfloat16 and device == "cpu" and operators.has_unit():
            seconds = [each / faster for each, faster in zip(seconds, _OWN_PRODUCTS, strict=True)]
        return 3 * 2 * rows * width * 4 * width / sum(seconds)

    def loops() -> float | None:
        """Of a CPU; how GPUs' programs spend their time is known otherwise."""
        if device != "cpu":
            return None
        values = torch.linspace(-4, 4, _LOOP_VALUES)
        out = torch.empty_like(values)

        def work() -> None:
            for _ in range(_LOOP_CALLS):
                torch.sigmoid(values, out=out)

        return _LOOP_FLOPS * _LOOP_CALLS * _LOOP_VALUES / _best_seconds(work, device)

    source = torch.ones(1 << 25, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    seconds = _best_seconds(lambda: copy.copy_(source), device)
    return Speeds(
        bf16_flops=product(torch.bfloat16),
        fp32_flops=product(torch.float32),
        bandwidth_bytes_per_second=2 * source.nbytes / seconds,
        bf16_products_flops=widest(torch.bfloat16),
        fp32_products_flops=widest(torch.float32),
        loops_flops=loops(),
    )


def _best_seconds(work: Callable[[], object], device: str) -> float:
    """Shortest of several runs after one to warm up.

    On a CPU time that other programs had the cores for is left out: processor time of all threads,
    which wait for one another awake, over their number.
    """
    import torch  # noqa: PLC0415 - as above

    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    work()
    best = float("inf")
    for _ in range(_REPEATS):
        wait()
        started, worked = time.perf_counter(), time.process_time()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
        if device == "cpu":
            best = min(best, (time.process_time() - worked) / torch.get_num_threads())
    return best
