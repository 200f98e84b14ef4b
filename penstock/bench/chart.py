"""The picture of benchmark results: a panel per metric, a bar per variant, a dot per round.

`bench/report.py` calls it. It must never know about files.
"""

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from penstock.bench.results import BenchmarkResults
from penstock.report.curve import LIGHT, Theme, as_png

_PANELS_ACROSS = 2
_BAR_INCHES, _PANEL_INCHES = 0.42, 1.1
"""Height of a bar, and of what a panel needs besides its bars."""


def draw_results(benchmarks: list[BenchmarkResults], theme: Theme = LIGHT) -> bytes:
    """PNG of all figures: medians as bars, least and greatest as whiskers, rounds as dots."""
    panels = [(b, metric) for b in benchmarks for metric in b.metrics()]
    across = min(_PANELS_ACROSS, len(panels))
    down = -(-len(panels) // across)
    most = max(len(benchmark.series) for benchmark in benchmarks)
    figure = Figure(
        figsize=(5.2 * across, down * (_PANEL_INCHES + most * _BAR_INCHES)),
        dpi=130,
        layout="constrained",
        facecolor=theme.paper,
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for place, (benchmark, metric) in zip(axes, panels, strict=False):
        _draw_panel(place, benchmark, metric, theme)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    return as_png(figure)


def _draw_panel(axes: Axes, benchmark: BenchmarkResults, metric: str, theme: Theme) -> None:
    """One metric of one benchmark; variants from top to bottom."""
    series = {v: s[metric] for v, s in benchmark.series.items() if metric in s}
    first = next(iter(series.values()))
    factor, unit = {"bytes": (2**-20, "MiB")}.get(first.unit, (1.0, first.unit))
    ways = {"higher": ", higher is better", "lower": ", lower is better"}
    for row, (variant, figures) in enumerate(series.items()):
        values = [value * factor for value in figures.values]
        median = figures.median * factor
        color = theme.validation if variant == benchmark.baseline else theme.train
        axes.barh(row, median, height=0.62, color=color, alpha=0.85)
        spread = [[median - min(values)], [max(values) - median]]
        axes.errorbar(median, row, xerr=spread, color=theme.ink, capsize=4, linewidth=1.2)
        axes.plot(values, [row] * len(values), "o", color=theme.ink, markersize=2.5, alpha=0.7)
    axes.set_yticks(range(len(series)), list(series))
    axes.set_ylim(len(series) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_facecolor(theme.paper)
    name = metric.replace("_", " ")
    axes.set_title(f"{benchmark.name}: {name}", loc="left", color=theme.ink, fontsize=10)
    label = (unit + ways.get(first.better or "", "")).removeprefix(", ")
    axes.set_xlabel(label, color=theme.ink, fontsize=9)
    axes.tick_params(colors=theme.ink, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.ink)
    axes.grid(axis="x", alpha=0.25)
