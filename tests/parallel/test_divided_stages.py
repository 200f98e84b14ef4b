"""Replicas of stages divide them as they divide whole models, and train what one process does."""

from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock.checkpoint import list_checkpoints
from tests.parallel.test_replicas import STEPS, assert_close, figures, job, run_jobs, state
from tests.parallel.test_stages_trained import MODEL, staged

WAYS = [("optimizer", "interleaved"), ("gradients", "zero-bubble"), ("weights", "1f1b")]
OTHERS = [
    ("optimizer", "1f1b"),
    ("gradients", "gpipe"),
    ("weights", "interleaved"),
    ("weights", "zero-bubble"),
]


@pytest.fixture(scope="module")
def alone(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    penstock.train(**{**job(dataset_folder, run), "model": MODEL})
    return run


def divided(dataset: Path, run: Path, shard: str, schedule: str = "1f1b", **more: object) -> dict:
    return staged(dataset, run, schedule, plan={"replicas": 2, "shard": shard}, **more)


def assert_same(run: Path, alone: Path) -> None:
    assert_close(run, alone)
    assert state(run).keys() == state(alone).keys()
    for key, tensor in state(alone).items():
        assert torch.allclose(state(run)[key], tensor, rtol=1e-3, atol=1e-5), key


def test_divided_stages_train_what_one_process_does(
    alone: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    jobs = [divided(dataset_folder, tmp_path / way[0], *way) for way in WAYS]
    # Then a run that is handed on to one process.
    short: dict[str, Any] = {"train": {"steps": 2 * STEPS // 3}}
    jobs.append(divided(dataset_folder, tmp_path / "handed-on", "weights", **short))
    run_jobs(jobs, tmp_path, processes=4)
    for shard, _ in WAYS:
        assert_same(tmp_path / shard, alone)
        newest = list_checkpoints(tmp_path / shard / "checkpoints")[-1]
        assert (newest / "optimizer-00004-of-00004.safetensors").is_file()
    penstock.train(**{**job(dataset_folder, tmp_path / "handed-on"), "model": MODEL})
    assert figures(tmp_path / "handed-on")[-3:] == pytest.approx(figures(alone)[-3:], rel=1e-5)


@pytest.mark.slow
def test_every_other_division_does_too_and_takes_up_what_one_process_left(
    alone: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    jobs = [divided(dataset_folder, tmp_path / "-".join(way), *way) for way in OTHERS]
    short = {"train": {"steps": STEPS // 3}}
    penstock.train(**{**job(dataset_folder, tmp_path / "handed-on", **short), "model": MODEL})
    jobs.append(divided(dataset_folder, tmp_path / "handed-on", "gradients"))
    run_jobs(jobs, tmp_path, processes=4)
    for way in OTHERS:
        assert_same(tmp_path / "-".join(way), alone)
    assert figures(tmp_path / "handed-on")[-3:] == pytest.approx(figures(alone)[-3:], rel=1e-5)
