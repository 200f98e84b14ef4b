"""A profile as one page with everything in it, that needs no network.

`profiling/report.py` calls it with what it has counted. It must never import torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from penstock.profiling.figures import draw_memory, draw_roofline
from penstock.profiling.processes import CollectiveRow, ProcessRow
from penstock.profiling.rows import (
    COLLECTIVE_COLUMNS,
    KERNEL_COLUMNS,
    PROCESS_COLUMNS,
    REGION_COLUMNS,
    WORK_COLUMNS,
    KernelRow,
    Row,
    collective_cells,
    figure,
    kernel_cells,
    process_cells,
    region_cells,
)
from penstock.report.summary import shown_environment


def draw_page(
    values: Mapping[str, Any],
    regions: Sequence[list[Row]],
    operations: list[KernelRow],
    processes: list[ProcessRow],
    collectives: list[CollectiveRow],
    memory: Mapping[str, Sequence[tuple[float, int]]],
) -> str:
    """The page.

    Args:
        values: the content of profile.json.
        regions: of each process.
        operations: of the first.
        processes: none where there is one.
        collectives: of all of them.
        memory: (seconds, bytes) over time, by process; "" where there is one.
    """
    points = [
        (row.name, row.intensity or 0.0, 1e9 * (row.gflops_per_second or 0.0)) for row in regions[0]
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return pages.get_template("profile.html").render(
        title=values["title"],
        cards=_cards(values, is_one=not processes),
        facts=values["facts"],
        processes=list(zip(process_cells(processes), map(_stretches, processes), strict=True)),
        process_columns=PROCESS_COLUMNS,
        collectives=[
            [f"{row.rank + 1}", *cells]
            for row, cells in zip(collectives, collective_cells(collectives), strict=True)
        ],
        collective_columns=("process", *COLLECTIVE_COLUMNS),
        regions=[_region_cells(rows) for rows in regions],
        region_columns=(*REGION_COLUMNS, *WORK_COLUMNS),
        kernels=kernel_cells(operations),
        kernel_columns=KERNEL_COLUMNS,
        notes=values["notes"],
        roofline=draw_roofline(points, values["peak_flops"], values["bandwidth_bytes_per_second"]),
        memory=draw_memory(memory),
        environment=shown_environment(values),
    )


def _cards(values: Mapping[str, Any], *, is_one: bool) -> list[tuple[str, str]]:
    """The large figures, each with what it is."""
    predicted, each = values["predicted_step_seconds"], values["each_step_seconds"]
    least, most = 1000 * min(each), 1000 * max(each)
    of_one = "" if is_one else ", for one process"
    compute = values["facts"]["compute"]
    cards = [
        (f"{1000 * values['step_seconds']:,.1f} ms", "a step, mean of those recorded"),
        (f"{least:,.0f}–{most:,.0f} ms", "quickest and slowest step"),
        (f"{values['peak_memory_bytes'] / 2**30:.2f} GiB", f"peak resident memory{of_one}"),
        (f"{values['peak_flops'] / 1e9:,.0f} GFLOP/s", f"measured peak, {compute}{of_one}"),
        (
            f"{values['bandwidth_bytes_per_second'] / 1e9:,.0f} GB/s",
            f"measured bandwidth{of_one}",
        ),
    ]
    if predicted is not None:
        cards.insert(2, (f"{1000 * predicted:,.1f} ms", "a step, as planned"))
    if values["link_bytes_per_second"] is not None and not is_one:
        speed = f"{values['link_bytes_per_second'] / 1e9:,.1f} GB/s"
        cards.append((speed, "measured link, from one process to another"))
    return cards


def _region_cells(rows: list[Row]) -> list[tuple[list[str], Row]]:
    """Each region's cells, and the row."""
    return [
        ([*cells, figure(row.flops, ",.1f", 1e-9), figure(row.bytes, ",.0f", 1e-6)], row)
        for cells, row in zip(region_cells(rows), rows, strict=True)
    ]


def _stretches(row: ProcessRow) -> list[tuple[str, float]]:
    """What a process's step consists of, as shares of it."""
    seconds = {
        "own": row.work_seconds,
        "communication": row.communication_seconds,
        "waiting": row.waiting_seconds,
        "data": row.data_seconds,
    }
    return [(name, value / row.step_seconds) for name, value in seconds.items()]
