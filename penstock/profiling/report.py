"""What `penstock profile` shows and writes: tables, a page that stands alone, the trace.

`api.profile` calls it. It reads a recording and never makes one.
"""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import jinja2

from penstock.console import Console
from penstock.files import atomic_write
from penstock.profiling.figures import draw_memory, draw_roofline
from penstock.profiling.session import Recording
from penstock.profiling.trace import MACHINE_CODE
from penstock.report.summary import environment

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


@dataclasses.dataclass
class ProfileResult:
    """A profile and its files."""

    folder: Path
    recording: Recording
    regions: list[Row]
    operations: list[KernelRow]
    values: dict[str, Any]
    """The content of profile.json."""

    def json(self) -> dict[str, Any]:
        """The content of profile.json, and where it is."""
        return {"folder": str(self.folder), **self.values}

    def show(self, console: Console) -> None:
        """The regions, the kernels, the files."""
        console.table(
            f"Profile: {self.recording.title}", _REGION_COLUMNS, _region_cells(self.regions)
        )
        console.table("Kernels and operations", _KERNEL_COLUMNS, _kernel_cells(self.operations))
        for note in self.values["notes"]:
            console.info(note)
        for name in ("profile.html", "profile.json", "trace.json.gz"):
            console.path(name, self.folder / name)


def write_profile(recording: Recording, folder: Path) -> ProfileResult:
    """Write FOLDER/profile.html, profile.json and trace.json.gz, each whole or not at all."""
    regions, operations = _regions(recording), _operations(recording)
    times, speeds = recording.times, recording.speeds
    peak = speeds.bf16_flops if recording.compute == "bf16" else speeds.fp32_flops
    values: dict[str, Any] = {
        "title": recording.title,
        "facts": recording.facts,
        "steps": times.steps,
        "step_seconds": times.total_seconds / times.steps,
        "each_step_seconds": times.step_seconds,
        "predicted_step_seconds": recording.predicted_seconds,
        "peak_flops": peak,
        "bandwidth_bytes_per_second": speeds.bandwidth_bytes_per_second,
        "peak_memory_bytes": recording.peak_memory_bytes,
        "regions": [dataclasses.asdict(row) for row in regions],
        "operations": [dataclasses.asdict(row) for row in operations],
        "notes": _notes(recording),
        **environment(),
    }
    result = ProfileResult(folder, recording, regions, operations, values)
    atomic_write(folder / "profile.json", json.dumps(values, indent=1) + "\n")
    atomic_write(folder / "trace.json.gz", gzip.compress(recording.trace, mtime=0))
    atomic_write(folder / "profile.html", _page(result))
    return result


def _regions(recording: Recording) -> list[Row]:
    """Every region, most time first."""
    times, speeds = recording.times, recording.speeds
    peak = speeds.bf16_flops if recording.compute == "bf16" else speeds.fp32_flops
    rows: list[Row] = []
    for name, total in times.by_region().items():
        seconds = total / times.steps
        work = recording.work.get(name)
        least = min(times.region_steps[name])
        known = work is not None and least > 0
        kernels = {p.kernel for p in times.seconds if p.region == name and p.kernel}
        counted = times.calls.get(name) or sum(times.calls[kernel] for kernel in kernels)
        rows.append(
            Row(
                name,
                seconds,
                least,
                total / times.total_seconds,
                counted / times.steps,
                work.flops / least / 1e9 if work and known else None,
                work.flops / least / peak if work and known else None,
                work.bytes / least / 1e9 if work and known else None,
                work.intensity if work else None,
            )
        )
    return rows


def _operations(recording: Recording) -> list[KernelRow]:
    """Kernels split into the library's products and the rest; other regions by operation."""
    times = recording.times
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


def _notes(recording: Recording) -> list[str]:
    """What a reader must know to read the figures right."""
    notes = [
        "Recording costs time itself, most where many small operations run: compare shares; for "
        "speeds use `train` or `bench`.",
        "GFLOP/s and GB/s are those of the step in which a region was quickest (least, in ms), as "
        "the peaks are the best this machine was measured at: a busy machine slows the others.",
        "FLOPs count matrix products and attention's as the planner does, bytes what must cross "
        "memory at least.",
    ]
    if any(place.operation == MACHINE_CODE for place in recording.times.seconds):
        notes.append(
            "A compiled kernel is one piece of machine code, its loops and its calls of the "
            "library's products together: torch's profiler sees a few operations inside, such as "
            "copies; the time of the rest cannot be split further."
        )
    return notes


_REGION_COLUMNS = ("region", "ms a step", "least", "share", "calls", "GFLOP/s", "of peak", "GB/s")
_KERNEL_COLUMNS = ("kernel or region", "operation", "ms a step", "share", "calls")


def _region_cells(rows: list[Row]) -> list[list[str]]:
    return [
        [
            row.name,
            f"{1000 * row.seconds:,.2f}",
            f"{1000 * row.least_seconds:,.2f}",
            f"{row.share:.1%}",
            _figure(row.calls, ",.4g"),
            _figure(row.gflops_per_second, ",.1f"),
            _figure(row.peak_share, ".0%"),
            _figure(row.gigabytes_per_second, ",.1f"),
        ]
        for row in rows
    ]


def _kernel_cells(rows: list[KernelRow]) -> list[list[str]]:
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


def _figure(value: float | None, form: str) -> str:
    return "–" if not value else format(value, form)


def _page(result: ProfileResult) -> str:
    """One page with everything in it."""
    values, recording = result.values, result.recording
    points = [
        (row.name, row.intensity or 0.0, 1e9 * (row.gflops_per_second or 0.0))
        for row in result.regions
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    predicted, each = values["predicted_step_seconds"], values["each_step_seconds"]
    least, most = 1000 * min(each), 1000 * max(each)
    cards = [
        (f"{1000 * values['step_seconds']:,.1f} ms", "a step, mean of those recorded"),
        (f"{least:,.0f}–{most:,.0f} ms", "quickest and slowest step"),
        (f"{values['peak_memory_bytes'] / 2**30:.2f} GiB", "peak resident memory"),
        (f"{values['peak_flops'] / 1e9:,.0f} GFLOP/s", f"measured peak, {recording.compute}"),
        (f"{values['bandwidth_bytes_per_second'] / 1e9:,.0f} GB/s", "measured bandwidth"),
    ]
    if predicted is not None:
        cards.insert(2, (f"{1000 * predicted:,.1f} ms", "a step, as planned"))
    return pages.get_template("profile.html").render(
        title=recording.title,
        cards=cards,
        facts=recording.facts,
        regions=list(zip(_region_cells(result.regions), result.regions, strict=True)),
        region_columns=_REGION_COLUMNS,
        kernels=_kernel_cells(result.operations),
        kernel_columns=_KERNEL_COLUMNS,
        notes=values["notes"],
        roofline=draw_roofline(points, values["peak_flops"], values["bandwidth_bytes_per_second"]),
        memory=draw_memory(recording.times.memory),
        environment={**values["environment"], **values["versions"]},
    )
