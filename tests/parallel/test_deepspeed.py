"""DeepSpeed's engine trains what one process does with torch's, and shares its checkpoints."""

import importlib.util
import json
from pathlib import Path

import pytest

import penstock
from penstock.cli import main
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import (
    STEPS,
    assert_close,
    assert_same_bits,
    figures,
    job,
    run_jobs,
    state,
)

IS_INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not IS_INSTALLED, reason="the extra `deepspeed` is not installed"
)
SHARDS = ("none", "optimizer", "gradients", "weights")
HALF = {"train": {"steps": STEPS // 2}}


def plan(shard: str, **more: object) -> dict:
    return {"plan": {"engine": "deepspeed", "shard": shard, **more}}


@pytest.fixture(scope="module")
def alone(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    penstock.train(**job(dataset_folder, run))
    return run


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
def test_a_stage_trains_what_one_process_does_and_hands_it_on(
    shard: str, alone: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    def given(run: str, more: dict) -> dict:
        return job(dataset_folder, tmp_path / run, **more)

    ours, theirs = {"plan": {"shard": "optimizer"}}, plan(shard)
    penstock.train(**given("from-torch", HALF))
    run_jobs(
        [
            given("straight", theirs),
            given("resumed", theirs | HALF),
            given("resumed", theirs),
            given("to-torch", theirs | HALF),
            given("to-torch", ours),
            given("from-torch", theirs),
        ],
        tmp_path,
    )
    for run in ("straight", "to-torch", "from-torch"):
        assert_close(tmp_path / run, alone)
        assert {n: t.shape for n, t in state(tmp_path / run).items()} == {
            n: t.shape for n, t in state(alone).items()
        }
    assert_same_bits(tmp_path / "resumed", tmp_path / "straight")


@needs_deepspeed
@pytest.mark.slow
def test_kernels_run_at_every_stage(
    tiny_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    def given(run: str, **more: object) -> dict:
        made = job(dataset_folder, tmp_path / run, **more)
        kept = {k: v for k, v in made.items() if k not in ("model", "precision", "compile")}
        return kept | {"batch": {"size": 16}, "executable": str(tiny_executable)}

    penstock.train(**given("alone"))
    run_jobs([given(shard, **plan(shard)) for shard in SHARDS], tmp_path)
    for shard in SHARDS:
        assert_close(tmp_path / shard, tmp_path / "alone")


@needs_deepspeed
@pytest.mark.slow
def test_bf16_weights_have_float32_masters(dataset_folder: Path, tmp_path: Path) -> None:
    rounded = {"precision": {"compute": "bf16"}}
    penstock.train(**job(dataset_folder, tmp_path / "alone", **rounded))
    run_jobs(
        [job(dataset_folder, tmp_path / s, **plan(s), **rounded) for s in SHARDS[1:]], tmp_path
    )
    for shard in SHARDS[1:]:
        # Sums in another order are rounded to other weights: torch's own division has 2.2e-4.
        assert figures(tmp_path / shard) == pytest.approx(figures(tmp_path / "alone"), rel=1e-3)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
def test_a_skipped_step_changes_nothing(shard: str, dataset_folder: Path, tmp_path: Path) -> None:
    guarded = {"train": {"steps": 32, "spike_factor": 1.02}}
    penstock.train(**job(dataset_folder, tmp_path / "alone", **guarded))
    run_jobs([job(dataset_folder, tmp_path / "run", **plan(shard), **guarded)], tmp_path)
    assert_close(tmp_path / "run", tmp_path / "alone")
    found = [json.loads((tmp_path / r / "summary.json").read_text()) for r in ("run", "alone")]
    assert [summary["skipped_steps"] for summary in found] == [1, 1]


@needs_deepspeed
@pytest.mark.slow
def test_other_settings_and_models_train_alike(dataset_folder: Path, tmp_path: Path) -> None:
    cases: dict[str, dict] = {
        "llama": {"model": {"preset": "llama-tiny"}},
        "decayed": {"optimizer": {"lr": 3e-3, "layer_decay": 0.7, "clip": None}},
        "recomputed": {"plan": {"recompute": "blocks"}},
    }
    jobs = []
    for name, case in cases.items():
        penstock.train(**(job(dataset_folder, tmp_path / f"{name}-alone") | case))
        theirs = plan("weights", **case.get("plan", {}))
        jobs.append(job(dataset_folder, tmp_path / name) | case | theirs)
    run_jobs(jobs, tmp_path)
    for name in cases:
        assert_close(tmp_path / name, tmp_path / f"{name}-alone")


@needs_deepspeed
@pytest.mark.slow
def test_parts_of_unequal_size_train_alike(dataset_folder: Path, tmp_path: Path) -> None:
    batch = {"batch": {"micro": 2, "size": 12}}
    penstock.train(**job(dataset_folder, tmp_path / "alone", **batch))
    jobs = []
    for shard in ("gradients", "weights"):
        made = job(dataset_folder, tmp_path / shard, **batch, **plan(shard))
        jobs += [made | {"train": made["train"] | HALF["train"]}, made]
    run_jobs(jobs, tmp_path, processes=3)
    for shard in ("gradients", "weights"):
        assert_close(tmp_path / shard, tmp_path / "alone")


@needs_deepspeed
def test_one_process_needs_no_others_and_says_nothing_more(
    alone: Path, dataset_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = job(dataset_folder, tmp_path / "run", **plan("gradients"))
    (tmp_path / "job.yaml").write_text(json.dumps(values))
    assert main(["train", "--config", str(tmp_path / "job.yaml"), "--quiet"]) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == STEPS + 2
    assert figures(tmp_path / "run") == pytest.approx(figures(alone), rel=1e-5)
    said = capfd.readouterr()
    assert "DeepSpeed" not in said.out + said.err
    assert "Warning" not in said.out + said.err


@pytest.mark.skipif(IS_INSTALLED, reason="DeepSpeed is installed")
def test_deepspeed_that_is_missing_is_one_line(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(dataset_folder, tmp_path, capsys, plan("none")) == (
        "penstock: DeepSpeed is not installed (plan.engine=deepspeed): "
        "pip install 'penstock[deepspeed]', or leave plan.engine out: plan.shard is torch's own then"
    )


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"lora": {"rank": 4}}, "lora does not go with plan.engine=deepspeed: it trains all"),
        ({"train": {"freeze": ["embed.*"]}}, "train.freeze does not go with plan.engine=deepspeed"),
        ({"optimizer": {"name": "muon"}}, "optimizer.name does not go with plan.engine=deepspeed"),
        ({"precision": {"compute": "bf16"}}, "its stage 0 has no float32 masters of bf16 weights"),
        (plan("weights", recompute="selective"), "plan.recompute does not go with plan.engine"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_one_line(
    more: dict,
    line: str,
    dataset_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert line in refusal(dataset_folder, tmp_path, capsys, plan("none") | more)
    assert not (tmp_path / "run").exists()


def test_profiles_are_of_torchs_own_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["device=cpu", "plan.engine=deepspeed", f"out={tmp_path}"]
    assert main(["profile", *words]) == 2
    assert capsys.readouterr().err.strip() == (
        "penstock: profile records torch's own steps (plan.engine): leave plan.engine out"
    )


def refusal(dataset: Path, folder: Path, capsys: pytest.CaptureFixture[str], more: dict) -> str:
    (folder / "job.yaml").write_text(json.dumps(job(dataset, folder / "run", **more)))
    assert main(["train", "--config", str(folder / "job.yaml")]) == 2
    lines = [part for part in capsys.readouterr().err.splitlines() if part.startswith("penstock")]
    assert len(lines) == 1
    return lines[0]
