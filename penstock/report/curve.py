"""Loss and speed over a run, drawn with matplotlib, without a display."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_TRAIN, _VALIDATION = "#2f6f9f", "#c4541a"
_SMOOTHING = 0.05
"""Share of the run that the smoothed line averages over."""


def draw_loss(metrics: Sequence[dict[str, Any]]) -> bytes:
    """PNG of the training loss, faint and smoothed, and the validation loss, by step."""
    figure, axes = _axes("loss (nats per token)")
    steps, losses = _series(metrics, "loss")
    if len(steps):
        axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color=_TRAIN, linewidth=2, label="training (smoothed)")
    at, validation = _series(metrics, "validation_loss")
    if len(at):
        axes.plot(at, validation, "o-", color=_VALIDATION, markersize=5, label="validation")
    if len(losses):
        # The first steps' loss would press everything of interest into a corner.
        top = float(np.quantile(losses, 0.98))
        bottom = float(min(losses.min(), validation.min() if len(validation) else np.inf))
        axes.set_ylim(bottom - 0.05 * (top - bottom + 1e-9), top + 0.1 * (top - bottom + 1e-9))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return _png(figure)


def draw_speed(metrics: Sequence[dict[str, Any]]) -> bytes | None:
    """PNG of tokens per second by step; None when no step was measured."""
    steps, speed = _series(metrics, "tokens_per_second")
    if not len(steps):
        return None
    figure, axes = _axes("tokens per second")
    axes.plot(steps, speed, color=_TRAIN, linewidth=1.5)
    axes.set_ylim(bottom=0)
    return _png(figure)


def _axes(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric."""
    points = [(m["step"], m[name]) for m in metrics if isinstance(m.get(name), int | float)]
    array = np.array(points, float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the last few values at each place."""
    window = max(1, int(len(values) * _SMOOTHING))
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
