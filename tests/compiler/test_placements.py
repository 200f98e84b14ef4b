"""Ours against the hand-made placements Graphcore published for GPT-2 on a POD16.

Source: graphcore/examples, nlp/gpt2/pytorch/run/pretraining_{small,medium,large_512,large}.sh,
with their sequence lengths and gradient accumulation; blocks are recomputed there, micro-batches
are of one sequence.
"""

import pytest

from penstock.compiler.plan import Plan
from penstock.compiler.planner import make_plan
from penstock.config.schema import BatchSection, ModelSection, PlanSection
from penstock.hardware.target import load_target
from penstock.models.resolve import resolve_architecture

PUBLISHED = {
    "small": ("gpt2", 1024, 2048, 4, [0, 4, 4, 4]),
    "medium": ("gpt2-medium", 1024, 4096, 2, [0, 3, 3, 3, 3, 4, 4, 4]),
    "large-512": ("gpt2-large", 512, 4096, 2, [1, 5, 5, 5, 5, 5, 5, 5]),
    "large-1024": (
        "gpt2-large", 1024, 8192, 1, [0, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 2],
    ),
}  # fmt: skip


def plan_for(name: str, accumulation: int, target: str, **fields: object) -> Plan:
    preset, length, _, replicas, _ = PUBLISHED[name]
    return make_plan(
        resolve_architecture(ModelSection(preset=preset)),
        batch=BatchSection(micro=1, size=accumulation * replicas),
        plan=PlanSection(recompute="blocks", replicas=replicas, shard="optimizer", **fields),
        compute="bf16",
        sequence_length=length,
        target=load_target(target),
    )


@pytest.mark.parametrize("target", ["graphcore-pod16", "graphcore-pod64"])
@pytest.mark.parametrize("name", list(PUBLISHED))
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_ours_is_never_worse_than_the_published_placement(
    name: str, schedule: str, target: str
) -> None:
    _, _, accumulation, _, by_hand = PUBLISHED[name]
    # GPipe holds every micro-batch at once, so that it can only be asked for a few.
    counts = (16, 32) if schedule == "gpipe" else (16, 32, accumulation)
    for count in counts:
        theirs = plan_for(name, count, target, layers_per_stage=by_hand, schedule=schedule)
        ours = plan_for(name, count, target, stages=len(by_hand), schedule=schedule)
        assert theirs.fits
        assert ours.fits
        assert ours.stages == theirs.stages
        assert ours.bubble <= theirs.bubble + 1e-12
        assert ours.memory["total"] <= theirs.memory["total"]
        assert ours.step_seconds <= theirs.step_seconds * (1 + 1e-12)


def test_where_it_is_strictly_better() -> None:
    theirs = plan_for("medium", 16, "graphcore-pod16", layers_per_stage=PUBLISHED["medium"][4])
    ours = plan_for("medium", 16, "graphcore-pod16", stages=8)
    assert ours.bubble < theirs.bubble - 0.02


def test_devices_hold_what_their_stage_says() -> None:
    plan = plan_for("small", 32, "graphcore-pod16", layers_per_stage=[0, 4, 4, 4])
    assert [device.holds for device in plan.devices] == ["embedding, head", *["4 blocks"] * 3]
    a = plan.architecture
    stored = sum(device.memory["weights"] for device in plan.devices)
    assert stored == 2 * a.parameter_count(padded=True)
    # Twelve bytes of optimizer state per parameter lie in streaming memory, divided among four.
    outside = sum(device.outside["optimizer"] for device in plan.devices)
    assert outside == pytest.approx(12 * a.parameter_count(padded=True) / 4, abs=8)
    assert all("optimizer" not in device.memory for device in plan.devices)
    # 1F1B with five positions: the first stage of blocks holds four micro-batches, the last two.
    inputs = 1024 * 768 * 2
    first, last = plan.devices[1].memory["activations"], plan.devices[3].memory["activations"]
    assert first - last == (4 - 2) * 4 * inputs
