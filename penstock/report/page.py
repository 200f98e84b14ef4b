"""A run's report: a loss curve as PNG and one HTML page that stands alone.

`api` writes it after training and evaluation. It reads the run folder and nothing else.
"""

import base64
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jinja2

from penstock.console import Console
from penstock.files import atomic_write
from penstock.report.curve import DARK, draw_loss, draw_speed
from penstock.report.summary import shown_environment
from penstock.training.metrics import read_metrics

_TEMPLATE = "page.html"
_TASK_SETTINGS = ("sequence_length", "stride", "mask_probability", "seed", "seconds")
"""Numbers of a task's result that are no measurements."""


@dataclasses.dataclass(frozen=True)
class ReportFiles:
    """What was written."""

    page: Path
    """The HTML page."""
    curve: Path
    """The PNG of the loss."""

    def json(self) -> dict[str, Any]:
        """Both paths."""
        return {"report": str(self.page), "loss_curve": str(self.curve)}

    def show(self, console: Console) -> None:
        """Both paths."""
        console.path("report", self.page)
        console.path("loss curve", self.curve)


def write_report(run: Path) -> ReportFiles:
    """Write RUN/loss.png and RUN/report.html from what the run folder holds.

    Read are metrics.jsonl, summary.json, plan.json, samples.jsonl and config.yaml; each may be
    missing or incomplete, and so then is the page.
    """
    metrics = read_metrics(run / "metrics.jsonl")
    summary = _read(run / "summary.json")
    files = ReportFiles(run / "report.html", run / "loss.png")
    curve = draw_loss(metrics)
    atomic_write(files.curve, curve)
    template = _environment().get_template(_TEMPLATE)
    page = template.render(
        name=run.resolve().name,
        complete=bool(summary.get("complete")),
        progress=_progress(summary),
        headline=_headline(summary),
        bars=_bars(summary),
        memory=_memory(summary, _read(run / "plan.json")),
        tasks=_tasks(summary),
        drawn=_drawn(summary),
        samples=_samples(run, summary),
        curve=(_embedded(curve), _embedded(draw_loss(metrics, DARK))),
        speed=(_embedded(draw_speed(metrics)), _embedded(draw_speed(metrics, DARK))),
        config=_text(run / "config.yaml"),
        environment=shown_environment(summary),
    )
    atomic_write(files.page, page)
    return files


def _environment() -> jinja2.Environment:
    """Templates beside this module, every value escaped."""
    folder = Path(__file__).parent
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )


def _embedded(image: bytes | None) -> str | None:
    """A PNG in base64, for a data address."""
    return base64.b64encode(image).decode() if image else None


def _section(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of the summary; empty where it is missing."""
    value = summary.get(name)
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _progress(summary: dict[str, Any]) -> str:
    """How far the run is, in words."""
    steps, seconds = _number(summary.get("steps")) or 0, _number(summary.get("seconds"))
    return f"{steps:,.0f} optimizer steps" + (f" in {seconds:,.0f} s" if seconds else "")


def _headline(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(figure, what it is) of what matters most, as far as it is known."""
    evaluation, speed = _section(summary, "evaluation"), _section(summary, "throughput")
    loss = _section(summary, "loss")
    candidates = [
        (evaluation.get("bits_per_byte"), ".3f", "bits per byte, held out"),
        (evaluation.get("perplexity"), ",.2f", "perplexity per token, held out"),
        (evaluation.get("word_perplexity"), ",.0f", "perplexity per word, held out"),
        (loss.get("best_validation"), ".3f", "best validation loss, nats per token"),
        (loss.get("final"), ".3f", "final training loss, nats per token"),
        (speed.get("tokens_per_second"), ",.0f", "tokens per second"),
        (speed.get("mfu"), ".0%", "of the measured matrix-product peak"),
        (summary.get("parameters"), ",.0f", "parameters"),
        (summary.get("tokens"), ",.0f", "tokens trained on"),
    ]
    known = [(_number(value), form, label) for value, form, label in candidates]
    return [(format(value, form), label) for value, form, label in known if value is not None]


def _bars(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte of the model and the compressors, best first, with relative widths."""
    ours = _number(_section(summary, "evaluation").get("bits_per_byte"))
    compressors = _section(summary, "compressors").items()
    others = {f"{name} -9": bits for name, value in compressors if (bits := _number(value))}
    if ours is None or not others:
        return []
    rows = {"this model": ours, **others}
    longest = max(rows.values())
    return [
        {
            "name": name,
            "bits": f"{bits:.3f}",
            "width": 100 * bits / longest,
            "ours": name == "this model",
        }
        for name, bits in sorted(rows.items(), key=lambda row: row[1])
    ]


def _memory(summary: dict[str, Any], plan: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, MiB) as planned, and what was measured."""
    planned = _section(_section(summary, "plan"), "memory") or _section(plan, "memory")
    rows = [(f"predicted, {kind}", _number(size)) for kind, size in planned.items()]
    if rows:
        rows.append(("measured, peak", _number(summary.get("memory_bytes"))))
    return [(kind, f"{size / 2**20:,.0f} MiB") for kind, size in rows if size is not None]


def _words(value: object) -> str:
    """A setting, or several, as text."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tasks(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(task, its figures, what they depend on) of everything that was evaluated."""
    rows: list[tuple[str, str, str]] = []
    for name in _section(summary, "tasks"):
        told = _section(_section(summary, "tasks"), name)
        numbers = {k: n for k, v in told.items() if (n := _number(v)) is not None}
        measured = {k: v for k, v in numbers.items() if k not in _TASK_SETTINGS}
        figures = [
            f"{key.replace('_', ' ')} " + (f"{value:.2%}" if "accuracy" in key else f"{value:,.5g}")
            for key, value in measured.items()
        ]
        others = [
            f"{key.replace('_', ' ')} {_words(value)}"
            for key, value in told.items()
            if key not in measured and value is not None
        ]
        rows.append((name, "; ".join(figures), "; ".join(others)))
    return rows


def _drawn(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(member, samples, part of all) of a mixture."""
    counts = _section(_section(summary, "data"), "samples")
    rows = [(name, _number(count)) for name, count in counts.items()]
    total = sum(count or 0 for _, count in rows)
    return [(n, f"{c:,.0f}", f"{c / total:.1%}") for n, c in rows if c is not None and total]


def _samples(run: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Completions in the summary, or that somebody wrote to RUN/samples.jsonl."""
    found: list[Any] = []
    inside = summary.get("samples")
    found += inside if isinstance(inside, list) else []
    for line in _text(run / "samples.jsonl").split("\n"):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [v for v in found if isinstance(v, dict) and {"prompt", "text"} <= v.keys()]


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none or it is damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _text(path: Path) -> str:
    """A file's text; empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
