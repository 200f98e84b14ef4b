"""Two pictures of a plan, as SVG: what each device does when, and what fills its memory.

`report/plan_page.py` writes them. They are drawn from a plan alone; this module must never import
torch or a plotting library, so that planning stays quick.
"""

from collections.abc import Sequence
from html import escape

from penstock.compiler.layout import DevicePlan
from penstock.compiler.pipeline import Slot, Timeline
from penstock.compiler.plan import Plan

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 1120, 172, 16, 30, 64
_PLOT = _WIDTH - _LEFT - _RIGHT
_MOST_DRAWN = 24
"""Micro-batches drawn, at least twice the pipeline's length where it is longer."""

KINDS = {
    "weights": ("#2f6f9f", "#5fa3d3"),
    "cache": ("#4f9a76", "#6fbb96"),
    "gradients": ("#8fb8d6", "#33658a"),
    "optimizer": ("#7a5ea8", "#a890d0"),
    "activations": ("#d98536", "#e0a065"),
    "logits": ("#b8475a", "#d57f8d"),
    "workspace": ("#8b959d", "#6d7881"),
    "checkpoint": ("#4f9a76", "#6fbb96"),
}
"""Colours of the kinds of memory, on light and on dark paper."""

_STYLE = """
svg { --ink: #1d2329; --soft: #5b6670; --line: #dde2e6; --paper: #ffffff; --idle: #f0f2f4;
  --f0: #2f6f9f; --f1: #5b93bd; --b0: #d98536; --b1: #e5a769; --h0: #7a5ea8; --h1: #9a83c2; KINDS
  font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ec; --soft: #9aa5ae; --line: #323a41;
  --paper: #1d2226; --idle: #272e34; --f0: #4a8fc2; --f1: #34719e; --b0: #d08a45; --b1: #a86a2c;
  --h0: #9a83c2; --h1: #7a5ea8; DARK } }
text { fill: var(--ink); } .soft { fill: var(--soft); }
.title { font-size: 15px; font-weight: 600; }
.label { fill: #fff; font-size: 10px; text-anchor: middle; pointer-events: none; }
.f0 { fill: var(--f0); } .f1 { fill: var(--f1); } .b0 { fill: var(--b0); } .b1 { fill: var(--b1); }
.h0 { fill: var(--h0); } .h1 { fill: var(--h1); } .idle { fill: var(--idle); }
.paper { fill: var(--paper); } .axis { stroke: var(--line); }
.limit { stroke: var(--ink); stroke-dasharray: 4 3; }
"""


def draw_timeline(plan: Plan) -> str:
    """Devices × time: forward and backward of every micro-batch, waiting left pale."""
    schedule = plan.timeline
    most = max(_MOST_DRAWN, 2 * len(plan.pieces))
    count = min(plan.accumulation, most - most % plan.stages)
    timeline = schedule.simulate(count)
    height = _TOP + _ROW * plan.stages + 56
    parts = [_heading(_timeline_title(plan), _timeline_note(plan, count))]
    scale = _PLOT / timeline.seconds
    for number, device in enumerate(plan.devices):
        y = _TOP + _ROW * number
        parts.append(_row_label(y, plan.stages, number, device))
        parts.append(_rectangle(_LEFT, y + 3, _PLOT, _ROW - 6, "idle"))
    parts.append(_time_axis(timeline, scale, _TOP + _ROW * plan.stages))
    parts += [_slot(slot, plan, scale) for slot in timeline.slots]
    names = [("f0", "forward"), ("b0", "backward")]
    if any(piece.is_head for piece in plan.pieces):
        names.append(("h0", "head"))
    parts.append(_legend([*names, ("idle", "waiting")], height - 12))
    return _document(height, "Micro-batches on devices over time", parts)


def draw_memory(plan: Plan) -> str:
    """A bar per device, by kind, against the memory it has."""
    largest = max(device.memory["total"] for device in plan.devices)
    most = max(largest, plan.memory_limit_bytes if largest > 0.25 * plan.memory_limit_bytes else 0)
    scale = _PLOT / (1.02 * most)
    height = _TOP + _ROW * plan.stages + 34
    verdict = "fits into" if plan.fits else "does not fit into"
    limit = plan.memory_limit_bytes
    parts = [_heading("Memory per device", f"{verdict} {_bytes(limit)} each")]
    kinds = [kind for kind in KINDS if any(d.memory.get(kind) for d in plan.devices)]
    for number, device in enumerate(plan.devices):
        y = _TOP + _ROW * number
        parts.append(_row_label(y, plan.stages, number, device))
        parts.append(_memory_bar(device, kinds, y, scale))
    if limit <= most:
        x = _LEFT + limit * scale
        bottom = _TOP + _ROW * plan.stages
        parts.append(
            f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{bottom + 4}"/>'
        )
    parts.append(_legend([(kind, kind) for kind in kinds], height - 12))
    return _document(height, "Memory per device by kind", parts)


def _timeline_title(plan: Plan) -> str:
    several = "es" * (plan.accumulation != 1)
    each = f"{plan.accumulation:,} micro-batch{several} of {plan.micro}"
    if plan.stages == 1:
        return f"One device, {each}"
    return f"{plan.schedule}, {plan.stages} stages, {each}"


def _timeline_note(plan: Plan, drawn: int) -> str:
    bound = "" if plan.measured else "at least "
    update = plan.step_seconds - plan.timeline.seconds(plan.accumulation)
    words = [f"{bound}{_seconds(plan.step_seconds)} per step"]
    if update > 0:
        words[0] += f", {_seconds(update)} of it the update after the last micro-batch"
    if plan.stages > 1:
        words.append(f"bubble {plan.bubble:.1%} of the devices' time")
    if drawn < plan.accumulation:
        words.append(f"drawn for {drawn} micro-batches, with a larger bubble")
    return "; ".join(words)


def _slot(slot: Slot, plan: Plan, scale: float) -> str:
    """One pass, with its number where there is room and its facts for the pointer."""
    is_head = plan.pieces[slot.piece].is_head
    kind = "h" if is_head else "f" if slot.is_forward else "b"
    x, width = _LEFT + slot.start * scale, (slot.end - slot.start) * scale
    if width <= 0:
        return ""
    y = _TOP + _ROW * slot.device + 3
    words = f"{'forward' if slot.is_forward else 'backward'}{' of the head' * is_head}"
    facts = f"micro-batch {slot.micro_batch}, {words}, {_seconds(slot.end - slot.start)}"
    gap = min(1.0, width / 8)
    shape = (
        f'<rect class="{kind}{slot.micro_batch % 2}" x="{x:.2f}" y="{y}" '
        f'width="{width - gap:.2f}" height="{_ROW - 6}"><title>{facts}</title></rect>'
    )
    number = str(slot.micro_batch)
    if width < 7 * len(number) + 3:
        return shape
    return shape + f'<text class="label" x="{x + width / 2:.1f}" y="{y + 16}">{number}</text>'


def _memory_bar(device: DevicePlan, kinds: Sequence[str], y: int, scale: float) -> str:
    """One device's kinds one after the other, its total behind them."""
    parts: list[str] = []
    x = float(_LEFT)
    for kind in kinds:
        size = device.memory.get(kind, 0)
        title = f"<title>{kind}: {_bytes(size)}</title>"
        parts.append(
            f'<rect fill="var(--{kind})" x="{x:.2f}" y="{y + 3}" width="{size * scale:.2f}" '
            f'height="{_ROW - 6}">{title}</rect>'
        )
        x += size * scale
    words = _bytes(device.memory["total"])
    for kind, size in device.outside.items():
        words += f" + {_bytes(size)} {kind} outside"
    is_right = x > _LEFT + 0.6 * _PLOT
    # On the bar, the words lie over colours light and dark.
    halo = "fill: #fff; paint-order: stroke; stroke: rgba(0, 0, 0, 0.6); stroke-width: 3px"
    place = f'x="{x - 6:.1f}" text-anchor="end" style="{halo}"' if is_right else f'x="{x + 6:.1f}"'
    parts.append(f'<text {place} y="{y + 19}">{words}</text>')
    return "".join(parts)


def _row_label(y: int, stages: int, number: int, device: DevicePlan) -> str:
    name = f"stage {number}" if stages > 1 else "device"
    holds = escape(device.holds)
    return (
        f'<text x="8" y="{y + 14}">{name}</text>'
        f'<text class="soft" x="8" y="{y + 26}" style="font-size: 10px">{holds}</text>'
    )


def _time_axis(timeline: Timeline, scale: float, y: int) -> str:
    """Five ticks."""
    parts: list[str] = []
    for n in range(6):
        time = timeline.seconds * n / 5
        x = _LEFT + time * scale
        anchor = "end" if n == 5 else "middle" if n else "start"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y + 4}"/>')
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{y + 18}" text-anchor="{anchor}">'
            f"{_seconds(time)}</text>"
        )
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, str]], y: int) -> str:
    parts: list[str] = []
    x = _LEFT
    for name, words in entries:
        fill = f'fill="var(--{name})"' if name in KINDS else f'class="{name}"'
        parts.append(f'<rect {fill} x="{x}" y="{y - 10}" width="12" height="12"/>')
        parts.append(f'<text x="{x + 17}" y="{y}">{words}</text>')
        x += 34 + 7 * len(words)
    return "".join(parts)


def _heading(title: str, note: str) -> str:
    return (
        f'<text class="title" x="8" y="24">{escape(title)}</text>'
        f'<text class="soft" x="8" y="44">{escape(note)}</text>'
    )


def _rectangle(x: float, y: float, width: float, height: float, name: str) -> str:
    return f'<rect class="{name}" x="{x}" y="{y}" width="{width}" height="{height}"/>'


def _document(height: int, description: str, parts: Sequence[str]) -> str:
    light = " ".join(f"--{kind}: {colours[0]};" for kind, colours in KINDS.items())
    dark = " ".join(f"--{kind}: {colours[1]};" for kind, colours in KINDS.items())
    style = _STYLE.replace("KINDS", light).replace("DARK", dark)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{description}"><style>{style}</style>'
        f"{_rectangle(0, 0, _WIDTH, height, 'paper')}{''.join(parts)}</svg>\n"
    )


def _seconds(time: float) -> str:
    """Three digits with a unit."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if time * factor >= 1:
            return f"{time * factor:.3g} {unit}"
    return "0 s" if time == 0 else f"{time * 1e9:.3g} ns"


def _bytes(size: float) -> str:
    """GiB from one on, else MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
