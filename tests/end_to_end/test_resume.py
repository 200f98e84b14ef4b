"""Whatever happens to a run, going on gives the bits of the run nothing happened to."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import penstock
from penstock.checkpoint import best_checkpoint, list_checkpoints, load_checkpoint
from penstock.config.load import as_config
from penstock.errors import CheckpointError
from penstock.runs import load_run
from penstock.training.metrics import read_metrics
from penstock.training.run_folder import RunFolder


def job(executable: Path, dataset: Path, run: Path, steps: int = 12, **more: object) -> dict:
    return {
        "executable": str(executable),
        "data": {"path": str(dataset)},
        "run": str(run),
        "batch": {"size": 8},
        "optimizer": {"lr": 3e-3, **more.pop("optimizer", {})},
        "schedule": {"warmup": 3},
        "train": {
            "steps": steps,
            "tensorboard": False,
            "report": False,
            "evaluate_every": 4,
            "evaluate_sequences": 8,
            **more.pop("train", {}),
        },
        "checkpoint": {"every": 2, "keep": 3, **more.pop("checkpoint", {})},
        **more,
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = list_checkpoints(run / "checkpoints")[-1]
    return load_checkpoint(newest).tensors


def losses(run: Path) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in read_metrics(run / "metrics.jsonl") if "loss" in m}


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def undisturbed(
    dropout_executable: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    penstock.train(**job(dropout_executable, dataset_folder, run))
    return run


def test_two_runs_are_bit_identical(
    undisturbed: Path, dropout_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    penstock.train(**job(dropout_executable, dataset_folder, tmp_path / "run"))
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_resumes_exactly(
    optimizer: str, dropout_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    chosen = {"optimizer": {"name": optimizer}}
    penstock.train(**job(dropout_executable, dataset_folder, whole, **chosen))
    first = job(dropout_executable, dataset_folder, parts, **chosen)
    penstock.train(**first)
    for path in list_checkpoints(parts / "checkpoints")[-2:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    penstock.train(**first)
    assert_same_run(whole, parts)


CHILD = """
import sys, json, penstock
from penstock.hardware.process import prepare_process
prepare_process()
penstock.train(**json.loads(sys.argv[1]))
"""


def start(arguments: dict) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, json.dumps(arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def kill_and_resume(arguments: dict, moments: list[float]) -> int:
    """Start, kill -9 after so many seconds of training, and so on; then finish. Returns kills."""
    kills = 0
    run = Path(arguments["run"])
    for moment in moments:
        process = start(arguments)
        while not losses(run) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        process.stderr.close()
    penstock.train(**arguments)
    return kills


def slow_job(executable: Path, dataset: Path, run: Path) -> dict:
    """Long enough to be killed in the middle."""
    more = {"train": {"evaluate_every": 20}, "checkpoint": {"every": 5}}
    return job(executable, dataset, run, steps=150, **more)


def test_killed_runs_end_with_the_same_bits(
    dropout_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    penstock.train(**slow_job(dropout_executable, dataset_folder, tmp_path / "whole"))
    chance = random.Random(0)
    moments = [chance.uniform(0, 1.0) for _ in range(3)]
    arguments = slow_job(dropout_executable, dataset_folder, tmp_path / "killed")
    assert kill_and_resume(arguments, moments) >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_twenty_kills_change_no_bit(
    dropout_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    penstock.train(**slow_job(dropout_executable, dataset_folder, tmp_path / "whole"))
    chance = random.Random(1)
    moments = [chance.uniform(0, 0.4) for _ in range(20)]
    arguments = slow_job(dropout_executable, dataset_folder, tmp_path / "killed")
    assert kill_and_resume(arguments, moments) >= 10
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(
    number: signal.Signals, dropout_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = slow_job(dropout_executable, dataset_folder, run)
    arguments["checkpoint"]["every"] = None
    process = start(arguments)
    while not losses(run) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == 0, process.stderr.read()
    process.stderr.close()
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert int(newest.name.split("-")[1]) == max(losses(run))


def test_damaged_newest_checkpoints_are_passed_over(
    undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(undisturbed)
    newest = list_checkpoints(folder.checkpoints)[-1] / "optimizer.safetensors"
    good = newest.read_bytes()
    try:
        newest.write_bytes(good[:-100])
        assert folder.resume_state("auto").step < 12
        damaged = bytearray(good)
        damaged[len(good) // 2] ^= 1
        newest.write_bytes(bytes(damaged))
        assert folder.resume_state("auto").step < 12
    finally:
        newest.write_bytes(good)
    assert "using the checkpoint before it" in capfd.readouterr().err
    assert folder.resume_state("auto").step == 12


def test_resume_policies(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already has checkpoints"):
        RunFolder(undisturbed).resume_state("never")
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        RunFolder(tmp_path).resume_state("must")
    assert RunFolder(tmp_path).resume_state("auto") is None


def test_only_the_newest_and_the_best_checkpoints_are_kept(undisturbed: Path) -> None:
    kept = [path.name for path in list_checkpoints(undisturbed / "checkpoints")]
    assert kept[-3:] == ["step-00000008", "step-00000010", "step-00000012"]
    best = best_checkpoint(undisturbed / "checkpoints").name
    assert set(kept) == {*kept[-3:], best}


def test_the_best_checkpoint_can_be_used(
    undisturbed: Path, trained_run: Path, tmp_path: Path
) -> None:
    best = best_checkpoint(undisturbed / "checkpoints").name
    for use, expected in (("best", best), ("newest", "step-00000012")):
        run = load_run(as_config(run=undisturbed, checkpoint={"use": use}))
        assert f"step-{run.state.step:08}" == expected
    shutil.copytree(trained_run, tmp_path / "run")
    [manifest] = (tmp_path / "run").glob("checkpoints/*/manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "is_best": False}))
    with pytest.raises(CheckpointError, match="never validated"):
        load_run(as_config(run=tmp_path / "run", checkpoint={"use": "best"}))


def test_a_run_in_use_is_refused(
    dropout_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    with RunFolder(tmp_path).lock(), pytest.raises(CheckpointError, match="in use by process"):
        penstock.train(**job(dropout_executable, dataset_folder, tmp_path))


@pytest.mark.parametrize("micro_size", [4, 8])
def test_any_split_of_the_batch_gives_the_same_losses(
    micro_size: int, dataset_folder: Path, tmp_path: Path
) -> None:
    """Eagerly in fp32, with dropout: the masks follow the sequence, not the micro-batch."""
    runs = []
    for micro in (2, micro_size):
        arguments = job(Path(), dataset_folder, tmp_path / str(micro), steps=4)
        del arguments["executable"]
        arguments |= {
            "model": {"preset": "gpt2-tiny", "dropout": 0.2},
            "batch": {"micro": micro, "size": 8},
            "precision": {"compute": "fp32"},
            "compile": {"mode": "off"},
        }
        penstock.train(**arguments)
        runs.append(list(losses(tmp_path / str(micro)).values()))
    assert runs[0] == pytest.approx(runs[1], rel=2e-6)
