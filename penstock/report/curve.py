"""Loss and speed over a run, drawn with matplotlib, without a display.

`report/page.py` calls it. It must never know about folders or pages.
"""

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a plot."""

    paper: str
    """Behind everything."""
    ink: str
    """Text, ticks and axes."""
    train: str
    """What was measured in training."""
    validation: str
    """What was measured on held-out text."""


LIGHT = Theme(paper="#ffffff", ink="#1d2329", train="#2f6f9f", validation="#c4541a")
DARK = Theme(paper="#1d2226", ink="#e6e9ec", train="#5fa3d3", validation="#f0884f")

_SMOOTHING = 0.05
"""Share of the run that the smoothed line averages over."""


def draw_loss(metrics: Sequence[dict[str, Any]], theme: Theme = LIGHT) -> bytes:
    """PNG of the training loss, faint and smoothed, and the validation loss, by step."""
    figure, axes = _axes("Loss", "loss (nats per token)", theme)
    steps, losses = _series(metrics, "loss")
    if len(steps):
        axes.plot(steps, losses, color=theme.train, alpha=0.3, linewidth=1)
        axes.plot(steps, _smooth(losses), color=theme.train, linewidth=2, label="train (smoothed)")
    at, validation = _series(metrics, "validation_loss")
    if len(at):
        axes.plot(at, validation, "o-", color=theme.validation, markersize=5, label="validation")
    if len(steps) or len(at):
        axes.set_ylim(*_limits(losses, validation))
        axes.legend(frameon=False, labelcolor=theme.ink)
    else:
        _say_nothing(axes, theme)
    return as_png(figure)


def draw_speed(metrics: Sequence[dict[str, Any]], theme: Theme = LIGHT) -> bytes | None:
    """PNG of tokens per second, and of the share of the peak, by step; None without figures."""
    steps, speed = _series(metrics, "tokens_per_second")
    if not len(steps):
        return None
    figure, axes = _axes("Speed", "tokens per second", theme)
    axes.plot(steps, speed, color=theme.train, linewidth=1.5)
    axes.set_ylim(0, max(float(speed.max()) * 1.1, 1e-9))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    known = [record for record in metrics if _finite(record.get("mfu"))]
    speeds = [(r["mfu"], r["tokens_per_second"]) for r in known if r.get("tokens_per_second")]
    if speeds:
        # One line serves both: the share of the peak is the speed times a constant of the run.
        share = float(np.median([mfu / speed for mfu, speed in speeds]))
        if share > 0:
            right = axes.secondary_yaxis(
                "right", functions=(lambda y: np.multiply(y, share), lambda y: np.divide(y, share))
            )
            right.set_ylabel("share of the measured peak (MFU)", color=theme.ink)
            right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            right.tick_params(colors=theme.ink)
            right.spines["right"].set_visible(False)
    return as_png(figure)


def _limits(losses: NDArray[np.float64], validation: NDArray[np.float64]) -> tuple[float, float]:
    """The range to show: the first steps' loss would press all of interest into a corner."""
    both = np.concatenate([losses, validation])
    bottom = float(both.min())
    top = max(float(np.quantile(losses, 0.98)) if len(losses) else bottom, *validation, bottom)
    margin = max(0.06 * (top - bottom), 0.01 * abs(top), 1e-3)
    return bottom - margin, top + margin


def _say_nothing(axes: Axes, theme: Theme) -> None:
    axes.text(0.5, 0.5, "no metrics yet", ha="center", transform=axes.transAxes, color=theme.ink)
    axes.set_xticks([])
    axes.set_yticks([])


def _axes(title: str, label: str, theme: Theme) -> tuple[Figure, Axes]:
    """An empty plot over optimizer steps."""
    figure = Figure(figsize=(8, 4), dpi=130, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor(theme.paper)
    axes.set_title(title, loc="left", color=theme.ink)
    axes.set_xlabel("optimizer step", color=theme.ink)
    axes.set_ylabel(label, color=theme.ink)
    axes.tick_params(colors=theme.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.ink)
    axes.grid(alpha=0.25)
    return figure, axes


def _finite(value: object) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def _series(
    metrics: Sequence[dict[str, Any]], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and finite values of one metric, each (n,)."""
    points = [(m["step"], m[name]) for m in metrics if _finite(m.get(name))]
    array = np.array(points, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the last few values at each place."""
    window = max(1, int(len(values) * _SMOOTHING))
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def as_png(figure: Figure) -> bytes:
    """The figure as a file's bytes, the same for the same figures: no date, no version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
