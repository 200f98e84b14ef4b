"""A run's report: a loss curve as PNG and one HTML page that stands alone.

`api` writes it after training and evaluation. It reads the run folder and nothing else.
"""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import jinja2

from penstock.console import Console
from penstock.files import atomic_write
from penstock.report.curve import draw_loss, draw_speed
from penstock.training.metrics import read_metrics

_TEMPLATE = "page.html"


@dataclasses.dataclass(frozen=True)
class ReportFiles:
    """What was written."""

    page: Path
    curve: Path

    def json(self) -> dict[str, Any]:
        """Both paths."""
        return {"report": str(self.page), "loss_curve": str(self.curve)}

    def show(self, console: Console) -> None:
        """Both paths."""
        console.path("report", self.page)
        console.path("loss curve", self.curve)


def write_report(run: Path) -> ReportFiles:
    """Write RUN/loss.png and RUN/report.html from metrics.jsonl, summary.json and config.yaml."""
    metrics = read_metrics(run / "metrics.jsonl")
    summary = _read(run / "summary.json")
    curve = draw_loss(metrics)
    speed = draw_speed(metrics)
    files = ReportFiles(run / "report.html", run / "loss.png")
    atomic_write(files.curve, curve)
    template = _environment().get_template(_TEMPLATE)
    page = template.render(
        name=run.resolve().name,
        summary=summary,
        headline=_headline(summary),
        bars=_bars(summary),
        memory=summary.get("plan", {}).get("memory", {}),
        samples=_samples(run),
        curve=base64.b64encode(curve).decode(),
        speed=base64.b64encode(speed).decode() if speed else None,
        config=_text(run / "config.yaml"),
        environment={**summary.get("environment", {}), **summary.get("versions", {})},
    )
    atomic_write(files.page, page)
    return files


def _environment() -> jinja2.Environment:
    folder = Path(__file__).parent
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )


def _headline(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(figure, what it is) of what matters most, as far as it is known."""
    evaluation, speed = summary.get("evaluation") or {}, summary.get("throughput") or {}
    loss = (summary.get("loss") or {}).get("final")
    candidates = [
        (evaluation.get("bits_per_byte"), ".3f", "bits per byte, held out"),
        (evaluation.get("perplexity"), ",.2f", "perplexity per token, held out"),
        (loss, ".3f", "final training loss, nats per token"),
        (speed.get("tokens_per_second"), ",.0f", "tokens per second"),
        (speed.get("mfu"), ".0%", "of the measured matrix-product peak"),
        (summary.get("parameters"), ",", "parameters"),
        (summary.get("tokens"), ",", "tokens trained on"),
    ]
    return [(format(value, form), label) for value, form, label in candidates if value is not None]


def _bars(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte of the model and the compressors, best first, with relative widths."""
    ours = (summary.get("evaluation") or {}).get("bits_per_byte")
    others = summary.get("compressors") or {}
    if ours is None or not others:
        return []
    rows = {"this model": ours, **{f"{name} -9": bits for name, bits in others.items()}}
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


def _samples(run: Path) -> list[dict[str, Any]]:
    """Completions somebody wrote to RUN/samples.jsonl."""
    samples: list[dict[str, Any]] = []
    for line in _text(run / "samples.jsonl").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and {"prompt", "text"} <= value.keys():
            samples.append(value)
    return samples


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
