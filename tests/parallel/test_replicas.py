"""Several processes train what one would, whatever they divide and whatever becomes of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import penstock
from penstock.checkpoint import list_checkpoints, load_checkpoint
from penstock.training.metrics import read_metrics
from tests.processes import torchrun

STEPS = 12
CHILD = """
import json, sys, penstock
from penstock.hardware.process import prepare_process
prepare_process()
for job in json.load(open(sys.argv[1])):
    penstock.train(**job)
"""


def job(dataset: Path, run: Path, **more: object) -> dict:
    return {
        "model": {"preset": "gpt2-tiny", "dropout": 0.1},
        "data": {"path": str(dataset), "sequence_length": 64},
        "batch": {"micro": 2, "size": 8},
        "precision": {"compute": "fp32"},
        "compile": {"mode": "off"},
        "optimizer": {"lr": 3e-3},
        "schedule": {"name": "constant", "warmup": 3},
        "run": str(run),
        "train": {
            "steps": STEPS,
            "evaluate_every": 6,
            "evaluate_sequences": 9,
            "tensorboard": False,
            "report": False,
            **more.pop("train", {}),
        },
        "checkpoint": {"every": 2, "keep": 3},
        **more,
    }


def run_jobs(jobs: list[dict], folder: Path, processes: int = 2, timeout: float = 400) -> None:
    """As a user of torchrun would: the jobs one after the other in the same processes."""
    torchrun(CHILD, jobs, folder, processes, timeout)


def figures(run: Path) -> list[float]:
    names = ("loss", "validation_loss", "grad_norm")
    records = read_metrics(run / "metrics.jsonl")
    return [record[name] for record in records for name in names if name in record]


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).tensors


def assert_close(run: Path, other: Path) -> None:
    """The same job up to the order of float32 sums: 1e-5 of losses and norms over all steps."""
    assert len(figures(run)) == len(figures(other)) >= 2 * STEPS
    assert figures(run) == pytest.approx(figures(other), rel=1e-5)


def assert_same_bits(run: Path, calm: Path) -> None:
    """Every loss, norm, weight and moment."""
    assert figures(run) == figures(calm)
    found, expected = state(run), state(calm)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def alone(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    penstock.train(**job(dataset_folder, run))
    return run


def test_any_division_among_processes_trains_what_one_process_does(
    alone: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    ways = ("none", "optimizer", "gradients", "weights")
    jobs = [job(dataset_folder, tmp_path / way, plan={"shard": way}) for way in ways]
    # Then back to one process, and to others, in the middle of a run.
    short = {"train": {"steps": STEPS // 2}}
    jobs.append(job(dataset_folder, tmp_path / "handed-on", plan={"shard": "weights"}, **short))
    run_jobs(jobs, tmp_path)
    for way in ways:
        assert_close(tmp_path / way, alone)
        assert state(tmp_path / way).keys() == state(alone).keys()
        assert all(
            tensor.shape == state(alone)[name].shape
            for name, tensor in state(tmp_path / way).items()
        )
    assert (alone / "checkpoints" / "step-00000012" / "model.safetensors").is_file()
    parts = tmp_path / "weights" / "checkpoints" / "step-00000012"
    assert (parts / "optimizer-00002-of-00002.safetensors").is_file()
    texts = [
        penstock.generate(run=run, generate={"prompt": "import ", "tokens": 8}).completions[0].text
        for run in (tmp_path / "weights", alone)
    ]
    assert texts[0] == texts[1]
    penstock.train(**job(dataset_folder, tmp_path / "handed-on"))
    assert_close(tmp_path / "handed-on", alone)


def test_streams_are_shared_out_by_lanes_and_handed_on(
    corpus: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    for part in range(8):  # a shard each: 4 MiB and some
        whole = "\n\n".join(texts[part:] + texts[:part])
        (tmp_path / f"{part}.txt").write_text(whole * (1 + 4_300_000 // len(whole)))

    def streamed(run: str, steps: int = STEPS) -> dict:
        made = job(dataset_folder, tmp_path / run, train={"steps": steps})
        lanes = {"streaming": True, "lanes": 8, "shuffle_buffer": 32, "sequence_length": 64}
        more = {"tokenizer": {"from": str(dataset_folder / "tokenizer.json")}, "data": lanes}
        return {
            **made,
            **more,
            "source": {"path": str(tmp_path / "*.txt"), "documents": "blank_line"},
        }

    penstock.train(**streamed("alone"))
    run_jobs([streamed("two"), streamed("handed-on", STEPS // 2)], tmp_path)
    penstock.train(**streamed("handed-on"))
    assert_close(tmp_path / "two", tmp_path / "alone")
    assert_close(tmp_path / "handed-on", tmp_path / "alone")


def test_adapters_are_trained_alike_however_they_are_divided(
    dataset_folder: Path, tmp_path: Path
) -> None:
    lora = {"lora": {"rank": 4, "targets": ["all-linear"], "dropout": 0.1}}
    penstock.train(**job(dataset_folder, tmp_path / "alone", **lora))
    ways = ("none", "weights")
    run_jobs(
        [job(dataset_folder, tmp_path / way, plan={"shard": way}, **lora) for way in ways], tmp_path
    )
    for way in ways:
        assert_close(tmp_path / way, tmp_path / "alone")
        assert state(tmp_path / way).keys() == state(tmp_path / "alone").keys()
        assert all(".adapters." in name for name in state(tmp_path / way))
    held = job(
        dataset_folder, tmp_path / "held", plan={"shard": "weights"},
        lora={"rank": 4, "base": "int8"},
    )  # fmt: skip
    process = start(held, tmp_path, "--processes", "2")
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 2
    lines = [line for line in error.splitlines() if line.startswith("penstock")]
    assert len(lines) == 1
    assert "plan.shard=weights divides weights that are numbers, not lora.base's bits" in lines[0]


def start(values: dict, folder: Path, *words: str) -> subprocess.Popen:
    config = folder / "job.yaml"
    config.write_text(json.dumps(values))
    command = [sys.executable, "-m", "penstock", "train", "--config", str(config), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ranks(launcher: int) -> list[int]:
    """Processes the launcher started, by /proc."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    while len(read_metrics(run / "metrics.jsonl")) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_a_lost_process_costs_a_restart_and_no_bit(dataset_folder: Path, tmp_path: Path) -> None:
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    run_jobs([job(dataset_folder, calm, train={"steps": 40})], tmp_path)
    values = job(dataset_folder, hit, train={"steps": 40})
    process = start(values, tmp_path, "--processes", "2")
    wait_for_steps(hit, 5, process)
    os.kill(ranks(process.pid)[-1], signal.SIGKILL)
    error = process.communicate(timeout=200)[1]
    assert process.returncode == 0, error
    assert "SIGKILL" in error
    assert "all start again (1 of 3)" in error
    assert_same_bits(hit, calm)


def test_a_stopped_launcher_leaves_a_checkpoint_and_nobody_behind(
    dataset_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    values = job(dataset_folder, run, train={"steps": 4000})
    process = start(values, tmp_path, "launch.processes=2")
    wait_for_steps(run, 3, process)
    children = ranks(process.pid)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0, error
    assert "goes on from the last checkpoint" in error
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert list_checkpoints(run / "checkpoints")[-1].name == f"step-{last:08}"
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_mistakes_are_told_once(dataset_folder: Path, tmp_path: Path) -> None:
    values = job(dataset_folder, tmp_path / "run", plan={"replicas": 3}, batch={"micro": 2})
    process = start(values, tmp_path, "--processes", "2")
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 2
    lines = [line for line in error.splitlines() if line.startswith("penstock")]
    assert lines == [
        "penstock: the plan is for 3 replicas, the job has 2 processes (plan.replicas): "
        "start it with --processes 3, or change plan.replicas"
    ]
