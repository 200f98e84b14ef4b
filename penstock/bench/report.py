"""What `penstock bench` shows and writes: JSON, CSV, a Markdown table, a picture.

`bench/runner.py` calls it after each benchmark. It reads figures and never makes any.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.bench.chart import draw_results
from penstock.bench.results import BenchmarkResults, Change
from penstock.console import Console
from penstock.files import atomic_write

_COLUMNS = ("benchmark", "variant", "metric", "unit", "rounds", "min", "median", "max")
_PERCENTILES = ("p50", "p90", "p99")


@dataclasses.dataclass
class BenchResult:
    """What was measured, and what changed since an earlier result."""

    folder: Path
    values: dict[str, Any]
    """The content of results.json."""
    benchmarks: list[BenchmarkResults] = dataclasses.field(default_factory=list)
    changes: list[Change] = dataclasses.field(default_factory=list)
    """Every figure that an earlier result has too; empty where none was named."""
    differences: list[str] = dataclasses.field(default_factory=list)
    """What is not the same around the earlier result: machine, versions."""

    def json(self) -> dict[str, Any]:
        """The content of results.json, and where it is."""
        return {"folder": str(self.folder), **self.values}

    def show(self, console: Console) -> None:
        """A table for each benchmark, the changes, the files."""
        for benchmark in self.benchmarks:
            console.info(_title(benchmark))
            for metric in benchmark.metrics():
                header, *rows = _table(benchmark, [metric])
                shown_rows = [row[1:] for row in rows]
                console.table(metric.replace("_", " "), ["", *header[2:]], shown_rows)
        if "comparison" in self.values:
            self._show_changes(console)
        for name in ("results.json", "results.csv", "results.md", "results.png"):
            console.path(name, self.folder / name)

    def _show_changes(self, console: Console) -> None:
        for difference in self.differences:
            console.warning(f"measured under other conditions: {difference}")
        flagged = [change for change in self.changes if change.is_flagged]
        if flagged:
            rows = list(map(_change_row, flagged))
            console.table("Changes beyond the noise", _CHANGE_COLUMNS, rows)
        else:
            console.info("no change beyond the noise")
        if not self.changes:
            console.warning("the earlier result has no figure in common with this one")
        if any(change.verdict == "too few rounds" for change in self.changes):
            console.warning("too few rounds to know the noise: a change needs 4 on both sides")


_CHANGE_COLUMNS = ("benchmark", "variant", "metric", "before", "after", "ratio", "verdict")


def write_results(result: BenchResult) -> None:
    """Write results.json, .csv, .md and .png into the result's folder, each whole or not at all."""
    folder = result.folder
    atomic_write(folder / "results.json", json.dumps(result.values, indent=1) + "\n")
    atomic_write(folder / "results.csv", _csv(result.benchmarks))
    atomic_write(folder / "results.md", _markdown(result))
    atomic_write(folder / "results.png", draw_results(result.benchmarks))


def shown(value: float, unit: str) -> str:
    """A figure for people: bytes in MiB or GiB, short times in ms, four digits."""
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if unit == "s":
        return f"{value:.4g} s" if value >= 1 else f"{1000 * value:.4g} ms"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def with_unit(value: float, unit: str) -> str:
    """A figure and its unit."""
    text = shown(value, unit)
    return text if unit in ("", "bytes", "s") else f"{text} {unit}"


def _title(benchmark: BenchmarkResults) -> str:
    plural = "s" if benchmark.rounds > 1 else ""
    return (
        f"{benchmark.name}: {benchmark.rounds} interleaved round{plural}, "
        f"{benchmark.warmup_rounds} before to warm up"
    )


def _table(benchmark: BenchmarkResults, chosen: Sequence[str]) -> list[list[str]]:
    """A header and a row per metric and variant; columns nothing stands in are left out."""
    header = ["metric", "variant", "median", "min", "max", f"× {benchmark.baseline}"]
    rows: list[list[str]] = []
    for metric in chosen:
        for variant, metrics in benchmark.series.items():
            if metric in metrics:
                rows.append([metric, variant, *_figures(benchmark, variant, metric)])
    columns = list(zip([*header, *_PERCENTILES], *rows, strict=True))
    kept = [column for column in columns if any(column[1:])]
    return [list(row) for row in zip(*kept, strict=True)]


def _figures(benchmark: BenchmarkResults, variant: str, metric: str) -> list[str]:
    """Median, least, greatest, relation to the baseline, percentiles; "" where there is none."""
    series = benchmark.series[variant][metric]
    ratio = benchmark.ratio(variant, metric)
    percentiles = series.percentiles
    return [
        with_unit(series.median, series.unit),
        shown(min(series.values), series.unit),
        shown(max(series.values), series.unit),
        "" if ratio is None else f"{ratio:.2f}×",
        *(shown(percentiles[p], series.unit) if percentiles else "" for p in _PERCENTILES),
    ]


def _change_row(change: Change) -> list[str]:
    before, after = (with_unit(value, change.unit) for value in (change.before, change.after))
    ratio = "" if change.ratio is None else f"{change.ratio:.3f}×"
    place = [change.benchmark, change.variant, change.metric]
    return [*place, before, after, ratio, change.verdict]


def _csv(benchmarks: list[BenchmarkResults]) -> str:
    """A line per benchmark, variant and metric; figures as they are, in the unit named."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*_COLUMNS, *_PERCENTILES])
    for benchmark in benchmarks:
        for variant, metrics in benchmark.series.items():
            for name, series in metrics.items():
                values = series.values
                row = [benchmark.name, variant, name, series.unit, len(values)]
                row += [min(values), series.median, max(values)]
                writer.writerow([*row, *(series.percentiles.get(p, "") for p in _PERCENTILES)])
    return buffer.getvalue()


def _markdown(result: BenchResult) -> str:
    """Tables of the figures and of the changes, the commands, the environment."""
    values = result.values
    lines = [f"# {Path(values['spec']).stem}", "", f"Measured {values['started']}.", ""]
    for benchmark in result.benchmarks:
        lines += [f"## {benchmark.name}", ""]
        if benchmark.description:
            lines += [benchmark.description, ""]
        lines += [f"{_title(benchmark)}.", ""]
        lines += [*_markdown_table(_table(benchmark, benchmark.metrics())), ""]
        lines += [f"- {v}: `{c}`" for v, c in benchmark.commands.items()] + [""]
    if "comparison" in values:
        lines += [f"## Compared with {values['comparison']['with']}", ""]
        lines += [f"- other conditions: {difference}" for difference in result.differences]
        rows = [_change_row(change) for change in result.changes]
        lines += ["", *_markdown_table([list(_CHANGE_COLUMNS), *rows]), ""]
    facts = {**values["environment"], **values["versions"]}
    rows = [[name.replace("_", " "), str(value)] for name, value in facts.items()]
    lines += ["## Environment", "", *_markdown_table([["", ""], *rows])]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: list[list[str]]) -> list[str]:
    """Rows, the first of them the header, as a Markdown table."""
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
