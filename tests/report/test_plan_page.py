"""A plan's pictures and page: every pass and every kind of memory is there, and nothing else is
loaded or referred to.
"""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from penstock.compiler.plan import Plan
from penstock.compiler.planner import make_generation_plan, make_plan
from penstock.config.schema import BatchSection, ModelSection, PlanSection
from penstock.hardware.target import load_target
from penstock.models.resolve import resolve_architecture
from penstock.report.plan_page import write_plan
from penstock.report.plan_picture import draw_memory, draw_timeline

SVG = "{http://www.w3.org/2000/svg}"


def plan_for(size: int = 8, target: str = "graphcore-pod16", **fields: object) -> Plan:
    return make_plan(
        resolve_architecture(ModelSection(preset="gpt2")),
        batch=BatchSection(micro=1, size=size),
        plan=PlanSection(**{"recompute": "blocks", "target": target, **fields}),
        compute="bf16",
        sequence_length=1024,
        target=load_target(target),
    )


def titles(svg: str) -> list[str]:
    return [str(node.text) for node in ElementTree.fromstring(svg).iter(f"{SVG}title")]


def texts(svg: str) -> list[str]:
    return [str(node.text) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_every_pass_is_drawn_once(schedule: str) -> None:
    plan = plan_for(stages=4, schedule=schedule)
    drawn = titles(draw_timeline(plan))
    visible = [p for p in plan.pieces if p.forward > 0]
    assert len(drawn) == len(set(range(8))) * 2 * len(visible)
    assert sum("head" in words for words in drawn) == 2 * 8


def test_passes_of_a_device_do_not_overlap_in_the_picture() -> None:
    root = ElementTree.fromstring(draw_timeline(plan_for(stages=4)))
    rows: dict[str, list[tuple[float, float]]] = {}
    for node in root.iter(f"{SVG}rect"):
        if re.fullmatch("[fbh][01]", node.get("class", "")) and len(node):
            x, width = float(node.get("x", "")), float(node.get("width", ""))
            rows.setdefault(node.get("y", ""), []).append((x, x + width))
    assert len(rows) == 4
    for spans in rows.values():
        ordered = sorted(spans)
        assert all(a[1] <= b[0] + 0.01 for a, b in zip(ordered, ordered[1:], strict=False))
        assert ordered[-1][1] <= 1120


def test_long_steps_are_drawn_in_part_and_say_so() -> None:
    plan = plan_for(size=2048, stages=4)
    note = texts(draw_timeline(plan))[1]
    assert "drawn for 24 micro-batches" in note
    assert f"bubble {plan.bubble:.1%}" in note
    assert "drawn for" not in texts(draw_timeline(plan_for(stages=4)))[1]


def test_memory_bars_are_as_long_as_their_bytes() -> None:
    plan = plan_for(stages=4)
    root = ElementTree.fromstring(draw_memory(plan))
    bars = [n for n in root.iter(f"{SVG}rect") if len(n)]
    widths = [float(bar.get("width", "")) for bar in bars]
    sizes = [
        device.memory.get(kind, 0)
        for device in plan.devices
        for kind in ("weights", "gradients", "activations", "logits", "workspace")
    ]
    scale = widths[0] / sizes[0]
    assert widths == pytest.approx([size * scale for size in sizes], abs=0.01)
    assert any("324 MiB optimizer outside" in words for words in texts(draw_memory(plan)))


def test_the_limit_is_drawn_where_it_matters() -> None:
    assert 'class="limit"' in draw_memory(plan_for(stages=4))
    assert 'class="limit"' not in draw_memory(plan_for(target="sambanova-sn30-tile"))


def test_the_folder_has_the_plan_its_pictures_and_a_page(tmp_path: Path) -> None:
    plan = plan_for(stages=4)
    files = write_plan(plan, tmp_path / "new" / "folder")
    assert Plan.from_json(json.loads(files.plan.read_bytes())) == plan
    page = files.page.read_text()
    assert draw_timeline(plan) in page
    assert files.timeline is not None
    assert files.timeline.read_text() == draw_timeline(plan)
    assert files.memory.read_text() == draw_memory(plan)
    assert "It fits: the fullest device needs" in page
    # It stands alone: no address but the name of the SVG namespace.
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}


def test_a_plan_that_does_not_fit_says_what_to_set(tmp_path: Path) -> None:
    plan = plan_for(recompute="none", layers_per_stage=[10, 1, 1])
    assert not plan.fits
    page = write_plan(plan, tmp_path).page.read_text()
    assert "It does not fit" in page
    assert plan.advice[0].split(" fits: ")[0] in page


def test_names_of_targets_are_text_and_never_markup(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text(
        "name: <script>alert(1)</script>\ndevice: cpu\nmemory_bytes: 8e9\nfast_bf16: true\n"
        "peak_flops: {bf16: 1e12}\nbandwidth_bytes_per_second: 4e10\n"
    )
    page = write_plan(plan_for(size=1, target=str(target)), tmp_path / "out").page.read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_drawing_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from penstock.cli import main; "
        "assert main(['plan', 'model.preset=gpt2', 'plan.target=h100', "
        f"'out={tmp_path}', '--quiet']) == 0; "
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {
        "plan.json", "timeline.svg", "memory.svg", "plan.html",
    }  # fmt: skip


def test_generation_has_no_timeline(tmp_path: Path) -> None:
    plan = make_generation_plan(
        resolve_architecture(ModelSection(preset="gpt2")),
        batch=4,
        compute="bf16",
        capacity=512,
        target=load_target("h200"),
    )
    assert plan.tokens_per_second == pytest.approx(4 / plan.step_seconds)
    assert plan.limited_by == "memory bandwidth"
    files = write_plan(plan, tmp_path)
    assert files.timeline is None
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "memory.svg", "plan.html"}
    assert "per token of all texts" in files.page.read_text()
    assert Plan.from_json(json.loads(files.plan.read_bytes())) == plan
