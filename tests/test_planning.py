"""From configs to plans: what a plan may be used for, and what the machine and the run add."""

import dataclasses
from pathlib import Path

import pytest

from penstock.compiler.plan import Plan
from penstock.config.load import load_config
from penstock.config.schema import Config
from penstock.errors import ConfigError, DoesNotFitError
from penstock.hardware.detect import free_memory_bytes
from penstock.planning import plan_of, require_fit, require_here, with_replicas
from penstock.train_demands import require_stages_here

TINY = ("model.preset=gpt2-tiny", "device=cpu")


def config_of(*words: str) -> Config:
    return load_config(None, [*TINY, *words]).config


def plan_for(*words: str) -> Plan:
    return plan_of(config_of(*words), None)


def test_a_plan_for_elsewhere_is_not_for_training() -> None:
    words = ("plan.target=h200",)
    with pytest.raises(ConfigError, match="is for h200 .cuda., training runs on cpu") as caught:
        require_here(config_of(*words), plan_for(*words))
    assert "(plan.target)" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan.micro_batches=1",), "needs 2 micro-batches or more, a step has 1 .batch.size."),
        (
            ("plan.schedule=interleaved", "plan.layers_per_stage=[1, 1]"),
            "needs two blocks on every stage, one has 1 .plan.layers_per_stage.",
        ),
    ],
)
def test_what_does_not_go_with_stages_is_refused(words: tuple[str, ...], message: str) -> None:
    given = ["plan.stages=2", "plan.target=cpu", "model.preset=gpt2-tiny", "batch.micro=1"]
    given += [] if "plan.micro_batches=1" in words else ["plan.micro_batches=2"]
    plan = plan_for(*given, *words)
    require_here(config_of(*given), plan_for(*given), processes=2)
    with pytest.raises(ConfigError, match=message):
        require_stages_here(plan)


def test_replicas_and_processes_must_be_equal() -> None:
    words = ("plan.replicas=2", "plan.target=cpu")
    with pytest.raises(ConfigError, match="the plan is for 2 replicas, the job has 1 process"):
        require_here(config_of(*words), plan_for(*words))
    require_here(config_of(*words), plan_for(*words), processes=2)
    chosen = with_replicas(config_of("plan.target=cpu"), 4).plan
    assert (chosen.replicas, "replicas" in chosen.model_fields_set) == (4, True)
    assert with_replicas(config_of(*words), 4).plan.replicas == 2


def test_divided_matrices_are_not_for_muon() -> None:
    words = ("plan.replicas=2", "plan.target=cpu", "plan.shard=weights", "optimizer.name=muon")
    with pytest.raises(ConfigError, match="optimizer.name=muon needs whole matrices"):
        require_here(config_of(*words), plan_for(*words), processes=2)


def test_this_machines_processor_is_a_target() -> None:
    here, named = plan_for("plan.target=cpu"), plan_for("plan.target=detect")
    assert (here.device, here.target, here.measured) == (named.device, named.target, True)
    require_here(config_of("plan.target=cpu"), here)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    words = ("model.preset=gpt2-large", "batch.micro=32", "plan.target=rtx-4090")
    plan = plan_for(*words)
    with pytest.raises(DoesNotFitError, match="rtx-4090 has 22.35 GiB .plan.: .* fits: "):
        require_fit(plan)


def test_saving_during_training_is_planned_with_a_copy_and_at_its_end_with_none() -> None:
    plain, saved = plan_for(), plan_for("checkpoint.every=10")
    assert plain.memory["checkpoint"] == 0
    assert saved.memory["checkpoint"] == 12 * saved.architecture.parameter_count(padded=True)


def test_a_run_with_checkpoints_is_planned_as_resumed(tmp_path: Path) -> None:
    words = ("model.preset=gpt2", f"run={tmp_path}", "batch.micro=1", "data.sequence_length=8")
    fresh = plan_for(*words)
    assert fresh.memory["checkpoint"] == 0
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert plan_for(*words).memory["checkpoint"] > 8 * fresh.architecture.table_elements(
        padded=True
    )
    assert plan_for(*words, "checkpoint.resume=never").memory == fresh.memory


def test_muon_is_planned_with_less_state() -> None:
    assert plan_for("optimizer.name=muon").memory["optimizer"] < plan_for().memory["optimizer"]


def test_without_kernels_more_is_kept() -> None:
    kept = plan_for().memory["activations"]
    assert plan_for("compile.mode=off").memory["activations"] > 1.5 * kept


def test_memory_that_others_use_is_told(tmp_path: Path) -> None:
    free = free_memory_bytes()
    assert free is not None
    target = tmp_path / "mine.yaml"
    target.write_text(
        "name: mine\ndevice: cpu\nmemory_bytes: 1e15\nfast_bf16: true\n"
        "peak_flops: {bf16: 1e12}\nbandwidth_bytes_per_second: 4e10\n"
    )
    # A machine of one's own file is not this one: nothing is said of others.
    plan = plan_for("batch.micro=1", f"plan.target={target}")
    assert plan.advice == ()
    from penstock.planning import _mind_others

    much = dataclasses.replace(plan, memory={**plan.memory, "total": free + 1})
    assert _mind_others(plan, plan.memory["total"]) == ()
    (line,) = _mind_others(much, free)
    assert f"leave {free / 2**30:.1f} GiB of it free now" in line
