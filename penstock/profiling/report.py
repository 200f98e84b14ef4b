"""What `penstock profile` shows and writes: tables, a page that stands alone, the trace.

`profiling/verb.py` calls it. It reads a recording and never makes one.
"""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

from penstock.console import Console
from penstock.files import atomic_write
from penstock.profiling.page import draw_page
from penstock.profiling.places import MACHINE_CODE
from penstock.profiling.processes import CollectiveRow, ProcessRow, collective_rows, process_row
from penstock.profiling.rows import (
    COLLECTIVE_COLUMNS,
    KERNEL_COLUMNS,
    PROCESS_COLUMNS,
    REGION_COLUMNS,
    KernelRow,
    Row,
    collective_cells,
    kernel_cells,
    operation_rows,
    process_cells,
    region_cells,
    region_rows,
)
from penstock.profiling.session import Recording
from penstock.report.summary import environment


@dataclasses.dataclass
class ProfileResult:
    """A profile and its files."""

    folder: Path
    values: dict[str, Any]
    """The content of profile.json."""

    @staticmethod
    def read(folder: Path) -> "ProfileResult":
        """What was written there."""
        return ProfileResult(folder, json.loads((folder / "profile.json").read_bytes()))

    def json(self) -> dict[str, Any]:
        """The content of profile.json, and where it is."""
        return {"folder": str(self.folder), **self.values}

    def show(self, console: Console) -> None:
        """The processes where there are several, the regions, the kernels, the files."""
        values = self.values
        processes = [ProcessRow(**row) for row in values["processes"]]
        title = f"Profile: {values['title']}"
        if processes:
            console.table(f"{title} (ms)", PROCESS_COLUMNS, process_cells(processes))
            rows = [CollectiveRow(**row) for row in values["collectives"] if row["rank"] == 0]
            cells = collective_cells(rows)
            console.table("Communication of process 1", COLLECTIVE_COLUMNS, cells)
            title = "Regions of process 1"
        regions = [Row(**row) for row in values["regions"]]
        console.table(title, REGION_COLUMNS, region_cells(regions))
        operations = [KernelRow(**row) for row in values["operations"]]
        console.table("Kernels and operations", KERNEL_COLUMNS, kernel_cells(operations))
        for note in values["notes"]:
            console.info(note)
        for name in ("profile.html", "profile.json", "trace.json.gz"):
            console.path(name, self.folder / name)


def write_profile(recording: Recording, folder: Path) -> ProfileResult:
    """Write FOLDER/profile.html, profile.json and trace.json.gz, each whole or not at all."""
    times, speeds = recording.times, recording.speeds
    peak = speeds.bf16_flops if recording.compute == "bf16" else speeds.fp32_flops
    link = speeds.link_bytes_per_second if recording.device == "cpu" else None
    regions = region_rows(times, recording.work, peak)
    operations, processes = operation_rows(times), recording.processes
    rows = [process_row(process) for process in processes]
    each = [region_rows(process.times, process.work, peak) for process in processes]
    collectives = [row for process in processes for row in collective_rows(process, link)]
    values: dict[str, Any] = {
        "title": recording.title,
        "facts": recording.facts,
        "device": recording.device,
        "steps": times.steps,
        "step_seconds": times.total_seconds / times.steps,
        "each_step_seconds": times.step_seconds,
        "predicted_step_seconds": recording.predicted_seconds,
        "peak_flops": peak,
        "bandwidth_bytes_per_second": speeds.bandwidth_bytes_per_second,
        "link_bytes_per_second": link,
        "peak_memory_bytes": recording.peak_memory_bytes,
        "regions": [dataclasses.asdict(row) for row in regions],
        "operations": [dataclasses.asdict(row) for row in operations],
        "processes": [dataclasses.asdict(row) for row in rows],
        "process_regions": [[dataclasses.asdict(row) for row in own] for own in each],
        "collectives": [dataclasses.asdict(row) for row in collectives],
        "notes": _notes(recording, link),
        **environment(),
    }
    atomic_write(folder / "profile.json", json.dumps(values, indent=1) + "\n")
    atomic_write(folder / "trace.json.gz", gzip.compress(recording.trace, mtime=0))
    lines = {f"process {p.rank + 1}": p.times.memory for p in processes} or {"": times.memory}
    atomic_write(
        folder / "profile.html",
        draw_page(values, each or [regions], operations, rows, collectives, lines),
    )
    return ProfileResult(folder, values)


def _notes(recording: Recording, link: float | None) -> list[str]:
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
            "A compiled kernel is one piece of machine code, its loops and its products "
            "together: torch's profiler sees a few operations inside, such as copies; the time of "
            "the rest cannot be split further."
        )
    if recording.device == "cuda":
        notes.append(
            "Times are the GPU's: kernels are booked under what launched them, and communication "
            "where nothing is computed meanwhile."
        )
    if recording.processes:
        notes += [_PROCESSES_NOTE, _COLLECTIVES_NOTE]
        if recording.device == "cpu":
            notes.append(
                "Processes of one host share its processor: peaks are the part of one of them."
            )
            notes += [] if link else ["`penstock doctor` measures the link, for `of link`."]
    return notes


_PROCESSES_NOTE = (
    "A process's own work, communication, waiting and data add up to its step: waiting is standing "
    "still for another that has not come, communication standing still, or copying, once all have. "
    "Beside is communication while the process did something else."
)
_COLLECTIVES_NOTE = (
    "MB of a collective are those of the whole that is summed, gathered or scattered; GB/s what a "
    "link must bear for it at least, over the time after the last process had come."
)
