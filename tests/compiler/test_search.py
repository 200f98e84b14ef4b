"""Plans that do not fit: what is named fits, is the fastest, and costs what it says."""

import itertools
import re

import pytest

from penstock.compiler.plan import Plan
from penstock.compiler.planner import make_plan
from penstock.config.load import load_config
from penstock.errors import ConfigError
from penstock.hardware.target import Target, load_target
from penstock.models.resolve import resolve_architecture


def plan_for(*overrides: str, target: Target | None = None) -> Plan:
    config = load_config(None, overrides).config
    architecture = resolve_architecture(config.model)
    return make_plan(
        architecture,
        batch=config.batch,
        plan=config.plan,
        compute=config.precision.compute,
        sequence_length=config.data.sequence_length or architecture.max_positions,
        target=target or load_target(config.plan.target),
        optimizer=config.optimizer.name,
        saves=config.checkpoint.every is not None,
    )


CASES = {
    "one small GPU": ("model.preset=gpt2-large", "batch.micro=32", "plan.target=rtx-4090"),
    "one large GPU": ("model.preset=gpt2-xl", "batch.micro=64", "plan.target=h100"),
    "a batch of its own": (
        "model.preset=gpt2-xl", "batch.micro=64", "batch.size=320", "plan.target=a100-80gb",
    ),
    "more devices": (
        "model.preset=gpt2-large", "batch.micro=4", "batch.size=256",
        "plan.target=graphcore-pod16",
    ),
    "a list of stages": (
        "model.preset=gpt2-large", "batch.micro=1", "batch.size=64",
        "plan.layers_per_stage=[0,6,30]", "plan.recompute=blocks", "plan.target=graphcore-pod64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_what_is_named_fits_and_costs_what_it_says(name: str) -> None:
    words = CASES[name]
    plan = plan_for(*words)
    assert not plan.fits
    keys, _, rest = plan.advice[0].partition(" fits: ")
    better = plan_for(*words, *keys.split())
    assert better.fits
    assert better.size == plan.size
    figures = re.match(r"([0-9.]+) GiB and ([0-9.e+-]+) s per step", rest)
    assert figures is not None
    assert float(figures[1]) == pytest.approx(better.memory["total"] / 2**30, abs=0.006)
    # Its stages may stand in a better order than those that were searched.
    assert better.step_seconds <= float(figures[2]) * 1.006


def test_nothing_tried_is_faster() -> None:
    words = CASES["one large GPU"]
    plan = plan_for(*words)
    keys = plan.advice[0].partition(" fits: ")[0].split()
    named = plan_for(*words, *keys)
    policies = ("none", "selective", "every-4", "every-2", "blocks")
    for micro, recompute in itertools.product((64, 32, 16, 8, 4, 2), policies):
        more = [f"batch.micro={micro}", "batch.size=64", f"plan.recompute={recompute}"]
        other = plan_for("model.preset=gpt2-xl", "plan.target=h100", *more)
        assert not other.fits or other.step_seconds >= named.step_seconds * (1 - 1e-9)


def test_a_plan_that_fits_is_left_alone() -> None:
    assert plan_for("model.preset=gpt2", "plan.target=h100").advice == ()


def test_when_nothing_fits_the_least_is_named() -> None:
    plan = plan_for("model.preset=gpt2-xl", "batch.micro=64", "plan.target=zen5-2core")
    assert not plan.fits
    (line,) = plan.advice
    found = re.fullmatch(
        r"None of \d+ plans tried fits; (.+) needs least, ([0-9.]+) GiB. Choose a smaller .*", line
    )
    assert found is not None
    least = plan_for(
        "model.preset=gpt2-xl", "batch.micro=64", "plan.target=zen5-2core", *found[1].split()
    )
    assert not least.fits
    assert least.memory["total"] < plan.memory["total"]
    assert float(found[2]) == pytest.approx(least.memory["total"] / 2**30, abs=0.006)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.layers_per_stage=[0,4,4]"], "places 8 blocks, the model has 12"),
        (["plan.layers_per_stage=[0,4,4,4]", "plan.stages=3"], "has 4 stages, plan.stages=3"),
        (["plan.stages=13"], "13 stages are more than the model's 12 blocks"),
        (["plan.stages=4", "plan.replicas=5"], "needs 20 devices, graphcore-pod16 has 16"),
        (["plan.replicas=17"], r"needs 17 devices.*\(plan.replicas\): use at most 16"),
        (["plan.replicas=3", "batch.size=8"], "not a multiple of .* × plan.replicas=3.*: use 12"),
        (
            ["plan.stages=4", "plan.schedule=interleaved", "batch.size=24"],
            "6 micro-batches are not a multiple of 4 stages",
        ),
        (["precision.compute=fp32", "plan.target=gaudi2"], "gaudi2 has no figure for fp32"),
    ],
)
def test_what_cannot_be_is_one_line_naming_the_key(overrides: list[str], message: str) -> None:
    words = ["model.preset=gpt2", "plan.target=graphcore-pod16", "batch.micro=4", *overrides]
    with pytest.raises(ConfigError, match=message) as caught:
        plan_for(*words)
    assert re.search(r"\((plan|batch|precision)\.", str(caught.value))
    assert "\n" not in str(caught.value)


def test_one_cpu_is_shared_by_its_stages() -> None:
    words = ("model.preset=gpt2", "plan.target=zen5-2core", "batch.micro=1", "batch.size=64")
    alone, four = plan_for(*words), plan_for(*words, "plan.stages=4")
    assert four.memory_limit_bytes == alone.memory_limit_bytes // 4
    # Four quarters of a processor do no more than the whole, and wait besides.
    assert four.step_seconds > alone.step_seconds


def test_replicas_divide_the_batch() -> None:
    words = ("model.preset=gpt2", "plan.target=h100", "batch.micro=4", "batch.size=64")
    alone, eight = plan_for(*words), plan_for(*words, "plan.replicas=8")
    assert (alone.accumulation, eight.accumulation) == (16, 2)
    assert alone.step_seconds / 8 < eight.step_seconds < alone.step_seconds / 4


def test_more_bandwidth_or_compute_is_what_the_limit_says() -> None:
    import dataclasses

    words = ("model.preset=gpt2", "batch.micro=4", "plan.target=h100")
    target = load_target("h100")
    assert plan_for(*words).limited_by == "compute"
    slow = dataclasses.replace(target, bandwidth_bytes_per_second=1e11)
    assert plan_for(*words, target=slow).limited_by == "memory bandwidth"
    linked = dataclasses.replace(target, link_bytes_per_second=1e9)
    assert plan_for(*words, "plan.replicas=8", target=linked).limited_by == "link"
    plan = plan_for(*words, "plan.replicas=8", target=linked)
    assert sum(plan.seconds.values()) == pytest.approx(plan.step_seconds)
