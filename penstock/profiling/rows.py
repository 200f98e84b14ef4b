"""The rows of a profile's tables, and how they are written: regions, kernels, processes, exchanges.

`profiling/report.py` shows them in the terminal and as JSON, `page.py` on a page. It must never
import torch.
"""

import dataclasses
from collections.abc import Mapping

from penstock.profiling.places import COMMUNICATION
from penstock.profiling.processes import CollectiveRow, ProcessRow
from penstock.profiling.trace import Times
from penstock.profiling.work import Work

_MOST_OPERATIONS = 8
"""Operations shown of a region that no kernel computes."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A region, or a kernel, in one step."""

    name: str
    seconds: float
    """Mean of the recorded steps."""
    least_seconds: float
    """In the step where it was quickest: what other programs slow down least."""
    share: float
    """Of the step's time."""
    calls: float
    flops: float | None
    """Of one step; None where the planner counts none."""
    bytes: float | None
    """That cross memory in one step, at least."""
    gflops_per_second: float | None
    peak_share: float | None
    """Of the measured matrix-product peak. Speeds are those of the quickest step."""
    gigabytes_per_second: float | None
    intensity: float | None
    """FLOPs per byte."""


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """What a compiled kernel, or a region without one, spends a step's time on."""

    name: str
    operation: str
    seconds: float
    share: float
    calls: float


def region_rows(times: Times, work: Mapping[str, Work], peak: float) -> list[Row]:
    """Every region, most time first; `peak` FLOP/s."""
    rows: list[Row] = []
    for name, total in times.by_region().items():
        own = work.get(name)
        least = min(times.region_steps[name])
        known = own is not None and least > 0
        kernels = {p.kernel for p in times.seconds if p.region == name and p.kernel}
        counted = times.calls.get(name) or sum(times.calls[kernel] for kernel in kernels)
        rows.append(
            Row(
                name,
                total / times.steps,
                least,
                total / times.total_seconds,
                counted / times.steps,
                own.flops if own else None,
                own.bytes if own else None,
                own.flops / least / 1e9 if own and known else None,
                own.flops / least / peak if own and known else None,
                own.bytes / least / 1e9 if own and known else None,
                own.intensity if own else None,
            )
        )
    return rows


def operation_rows(times: Times) -> list[KernelRow]:
    """Kernels split into the library's products and the rest; other regions by operation."""
    rows: list[KernelRow] = []
    seen: dict[str, int] = {}
    for place, seconds in sorted(times.seconds.items(), key=lambda item: -item[1]):
        name = place.kernel or place.region
        seen[name] = seen.get(name, 0) + 1
        share = seconds / times.total_seconds
        if seen[name] > _MOST_OPERATIONS or share < 5e-4:
            continue
        calls = times.operations[place] / times.steps
        rows.append(KernelRow(name, place.operation, seconds / times.steps, share, calls))
    return rows


PROCESS_COLUMNS = ("process", "step", "own", COMMUNICATION, "waiting", "data", "beside", "MiB")
COLLECTIVE_COLUMNS = ("collective", "calls", "MB", "ms", "waiting", "beside", "GB/s", "of link")
REGION_COLUMNS = ("region", "ms", "least", "share", "calls", "GFLOP/s", "peak", "GB/s")
WORK_COLUMNS = ("GFLOP", "MB")
"""Besides, on the page: a terminal has no room."""
KERNEL_COLUMNS = ("kernel or region", "operation", "ms", "share", "calls")


def region_cells(rows: list[Row]) -> list[list[str]]:
    """As text."""
    return [
        [
            row.name,
            f"{1000 * row.seconds:,.2f}",
            f"{1000 * row.least_seconds:,.2f}",
            f"{row.share:.1%}",
            figure(row.calls, ",.4g"),
            figure(row.gflops_per_second, ",.1f"),
            figure(row.peak_share, ".0%"),
            figure(row.gigabytes_per_second, ",.1f"),
        ]
        for row in rows
    ]


def kernel_cells(rows: list[KernelRow]) -> list[list[str]]:
    """As text."""
    return [
        [
            row.name,
            row.operation,
            f"{1000 * row.seconds:,.2f}",
            f"{row.share:.1%}",
            f"{row.calls:,.4g}",
        ]
        for row in rows
    ]


def figure(value: float | None, form: str, factor: float = 1.0) -> str:
    """`value` × `factor` in a format; a dash where there is none."""
    return "–" if not value else format(value * factor, form)


def process_cells(rows: list[ProcessRow]) -> list[list[str]]:
    """As text: milliseconds of one step, MiB."""
    return [
        [
            f"{row.rank + 1}",
            *(
                f"{1000 * seconds:,.1f}"
                for seconds in (
                    row.step_seconds,
                    row.work_seconds,
                    row.communication_seconds,
                    row.waiting_seconds,
                    row.data_seconds,
                    row.beside_seconds,
                )
            ),
            f"{row.peak_memory_bytes / 2**20:,.0f}",
        ]
        for row in rows
    ]


def collective_cells(rows: list[CollectiveRow]) -> list[list[str]]:
    """As text: milliseconds of one step."""
    return [
        [
            row.kind,
            f"{row.calls:,.4g}",
            f"{row.bytes / 1e6:,.3g}",
            f"{1000 * row.seconds:,.1f}",
            f"{1000 * row.waiting_seconds:,.1f}",
            f"{1000 * row.beside_seconds:,.1f}",
            figure(row.gigabytes_per_second, ",.2f"),
            figure(row.link_share, ".0%"),
        ]
        for row in rows
    ]
