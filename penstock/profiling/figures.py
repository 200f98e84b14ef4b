"""The pictures of a profile, as SVG: a roofline, and memory over time.

`profiling/report.py` puts them into the page. They are drawn from figures alone.
"""

import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from penstock.report.curve import LIGHT

_COLORS = ("#2f6f9f", "#c4541a", "#4f9a76", "#7a5ea8", "#d98536", "#b8475a", "#5b6670", "#8fb8d6")
_MOST_POINTS = 4000
"""Points of the memory's line: more would only make the page large."""


def draw_roofline(
    points: Sequence[tuple[str, float, float]], peak_flops: float, bandwidth: float
) -> str:
    """Regions by FLOPs per byte and FLOP/s reached, under what the machine was measured at.

    `points`: (region, FLOPs per byte, FLOP/s); `peak_flops` FLOP/s, `bandwidth` bytes/s.
    Source: Williams, Waterman, Patterson, Roofline (CACM 52(4), 2009).
    """
    figure, axes = _axes("Roofline", "FLOPs per byte", "GFLOP/s")
    ridge = peak_flops / bandwidth
    shown = [point for point in points if point[1] > 0 and point[2] > 0]
    intensities = [intensity for _, intensity, _ in shown]
    x = np.geomspace(min([ridge / 10, *intensities]) / 2, max([ridge * 10, *intensities]) * 2, 200)
    roof = np.minimum(peak_flops, x * bandwidth) / 1e9
    axes.loglog(x, roof, color=LIGHT.ink, linewidth=1.5)
    label = f"{peak_flops / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.0f} GB/s measured"
    axes.text(x[-1], roof[-1] * 1.15, label, ha="right", color=LIGHT.ink, fontsize=9)
    for index, (name, intensity, flops) in enumerate(shown):
        color = _COLORS[index % len(_COLORS)]
        axes.loglog([intensity], [flops / 1e9], "o", color=color, markersize=8, label=name)
    if shown:
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.set_ylim(top=peak_flops / 1e9 * 2)
    return _svg(figure)


def draw_memory(lines: Mapping[str, Sequence[tuple[float, int]]]) -> str:
    """What tensors hold over time, beyond what they held when recording began.

    `lines`: (seconds, bytes) of each process, by its name; "" where there is one.
    """
    figure, axes = _axes("Memory of tensors over time", "seconds", "MiB beyond the start")
    for (name, line), color in zip(lines.items(), itertools.cycle(_COLORS), strict=False):
        if not line:
            continue
        # The largest of each stretch: a peak is what matters and may last for an instant.
        chunk = -(-len(line) // _MOST_POINTS)
        parts = [line[i : i + chunk] for i in range(0, len(line), chunk)]
        highest = [max(part, key=lambda point: point[1]) for part in parts]
        seconds, sizes = np.array(highest, np.float64).T
        axes.fill_between(seconds, sizes / 2**20, step="post", color=color, alpha=0.25)
        axes.step(seconds, sizes / 2**20, where="post", color=color, linewidth=1, label=name)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    if not any(lines.values()):
        axes.text(0.5, 0.5, "nothing recorded", ha="center", transform=axes.transAxes)
    return _svg(figure)


def _axes(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4), layout="constrained", facecolor=LIGHT.paper)
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=LIGHT.ink)
    axes.set_xlabel(across, color=LIGHT.ink)
    axes.set_ylabel(up, color=LIGHT.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an element to put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
