"""Zero-bubble pipelines through kernels: gradients of weights in passes of their own."""

from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock.compiler.executable import Executable
from penstock.errors import ExecutableError
from tests.parallel.test_replicas import assert_close, figures, job, run_jobs
from tests.parallel.test_stages_composed import FROZEN, LORA

ZERO_BUBBLE = {"stages": 2, "schedule": "zero-bubble"}
MODEL = {"preset": "gpt2-tiny", "layers": 4}
DROPOUT = {"model": {**MODEL, "dropout": 0.1}}


def with_kernels(dataset: Path, run: Path, executable: Path, **plan: object) -> dict[str, Any]:
    """What `job` trains, by an executable for 4 × 64 tokens."""
    made = job(dataset, run, model=MODEL, batch={"micro": 4, "size": 16}, plan=plan)
    given = {name: value for name, value in made.items() if name != "compile"}
    return {**given, "executable": str(executable)}


def by_graphs(dataset: Path, run: Path, **more: Any) -> dict[str, Any]:
    """The regions' graphs as they are lowered, run operator by operator."""
    plan = {**ZERO_BUBBLE, **more.pop("plan", {})}
    return job(dataset, run, **{**DROPOUT, "compile": {"toolchain": "eager"}, "plan": plan, **more})


@pytest.mark.slow
def test_machine_code_trains_by_zero_bubble_what_one_process_does_without(
    tiny_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    executable = tmp_path / "apart.penstock"
    penstock.compile(
        model=MODEL,
        batch={"micro": 4, "size": 16},
        data={"sequence_length": 64},
        precision={"compute": "fp32"},
        plan=ZERO_BUBBLE,
        executable=executable,
    )
    plan = Executable.open(executable).plan
    with pytest.raises(
        ExecutableError, match="plan.schedule=zero-bubble wants them apart"
    ) as caught:
        Executable.open(tiny_executable).require(plan)
    assert "rebuild it with `penstock compile" in str(caught.value)
    assert "plan.schedule=zero-bubble" in str(caught.value).partition("rebuild")[2]
    alone = job(dataset_folder, tmp_path / "alone", model=MODEL, batch={"micro": 4, "size": 16})
    penstock.train(**alone)
    jobs = [
        with_kernels(dataset_folder, tmp_path / "selective", executable, **ZERO_BUBBLE),
        with_kernels(
            dataset_folder, tmp_path / "blocks", executable, **ZERO_BUBBLE, recompute="blocks"
        ),
        # An executable with more than is asked for serves as well.
        with_kernels(dataset_folder, tmp_path / "1f1b", executable, stages=2),
    ]
    run_jobs(jobs, tmp_path)
    for name in ("selective", "blocks", "1f1b"):
        assert_close(tmp_path / name, tmp_path / "alone")


@pytest.mark.slow
def test_it_composes_with_what_kernels_train(dataset_folder: Path, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "dropout": {},
        "recomputed": {"plan": {"recompute": "every-2"}},
        "kept": {"plan": {"recompute": "none"}},
        "adapters": LORA,
        "held": {"lora": {**LORA["lora"], "base": "nf4"}, "plan": {"recompute": "blocks"}},
        "frozen": FROZEN,
        "llama": {"model": {"preset": "llama-tiny", "layers": 4, "dropout": 0.1}},
        "rounded": {"precision": {"compute": "bf16"}},
    }
    for name, more in cases.items():
        penstock.train(**job(dataset_folder, tmp_path / f"{name}-alone", **{**DROPOUT, **more}))
    run_jobs(
        [by_graphs(dataset_folder, tmp_path / name, **cases[name]) for name in cases], tmp_path
    )
    found, expected = (figures(tmp_path / f"rounded{end}") for end in ("", "-alone"))
    assert found == pytest.approx(expected, rel=5e-3)
    for name in cases.keys() - {"rounded"}:
        assert_close(tmp_path / name, tmp_path / f"{name}-alone")


@pytest.mark.slow
def test_stages_are_divided_among_replicas_and_parts(dataset_folder: Path, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "weights": {"replicas": 2, "shard": "weights"},
        "gradients": {"replicas": 2, "shard": "gradients", "recompute": "blocks"},
        "parts": {"tensor": 2},
        "parts again": {"tensor": 2, "recompute": "blocks"},
    }
    penstock.train(**job(dataset_folder, tmp_path / "alone", **DROPOUT))
    jobs = [by_graphs(dataset_folder, tmp_path / name, plan=plan) for name, plan in cases.items()]
    run_jobs(jobs, tmp_path, processes=4)
    for name in cases:
        assert_close(tmp_path / name, tmp_path / "alone")
