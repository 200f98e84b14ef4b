"""A plan's files: plan.json, its pictures as SVG, and one HTML page that stands alone.

`api.plan` writes them into the folder the user names. It must never import torch.
"""

import dataclasses
import json
from pathlib import Path

import jinja2

from penstock.compiler.plan import Plan
from penstock.files import atomic_write
from penstock.report.plan_picture import draw_memory, draw_timeline

_TEMPLATE = "plan.html"


@dataclasses.dataclass(frozen=True)
class PlanFiles:
    """What was written."""

    plan: Path
    memory: Path
    page: Path
    timeline: Path | None
    """None for generating, which has no micro-batches."""


def write_plan(plan: Plan, folder: Path) -> PlanFiles:
    """Write FOLDER/plan.json, memory.svg, plan.html, and timeline.svg for training."""
    timeline, memory = draw_timeline(plan) if plan.pieces else None, draw_memory(plan)
    files = PlanFiles(
        plan=folder / "plan.json",
        memory=folder / "memory.svg",
        page=folder / "plan.html",
        timeline=None if timeline is None else folder / "timeline.svg",
    )
    atomic_write(files.plan, json.dumps(plan.to_json(), indent=1))
    atomic_write(files.memory, memory)
    if timeline is not None:
        atomic_write(folder / "timeline.svg", timeline)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template(_TEMPLATE).render(
        plan=plan,
        verdict=_verdict(plan),
        headline=_headline(plan),
        facts=plan.facts(),
        timeline=timeline,
        memory=memory,
    )
    atomic_write(files.page, page)
    return files


def _verdict(plan: Plan) -> str:
    needed, limit = plan.memory["total"] / 2**30, plan.memory_limit_bytes / 2**30
    words = "It fits" if plan.fits else "It does not fit"
    return f"{words}: the fullest device needs {needed:.2f} of {limit:.2f} GiB."


def _headline(plan: Plan) -> list[tuple[str, str]]:
    """(figure, label)."""
    bound = "" if plan.measured else "≥ "
    unit = "per token of all texts" if plan.mode == "generate" else "per step"
    cards = [
        (f"{bound}{plan.step_seconds:.3g} s", unit),
        (f"{'' if plan.measured else '≤ '}{plan.tokens_per_second:,.0f}", "tokens per second"),
        (plan.limited_by, "limits the step"),
        (f"{plan.memory['total'] / 2**30:.2f} GiB", "on the fullest device"),
    ]
    if plan.stages > 1:
        cards.append((f"{plan.bubble:.1%}", "bubble"))
    return cards
