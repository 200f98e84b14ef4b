"""Signals that ask to stop, to one process of several: all save the same step and end well.

SIGTERM to a launcher: `tests/parallel/test_replicas.py`; to a run of one process:
`tests/end_to_end/test_resume.py`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import penstock
from penstock.checkpoint import list_checkpoints
from penstock.training.metrics import read_metrics
from penstock.training.signals import StopSignals
from tests.parallel.test_replicas import assert_same_bits, job, ranks, start, wait_for_steps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_acts(number: signal.Signals) -> None:
    acted: list[int] = []
    before = signal.signal(number, lambda received, frame: acted.append(received))
    try:
        with StopSignals() as stop:
            assert stop.requested is None
            os.kill(os.getpid(), number)
            assert stop.requested == number.name
            assert acted == []
            os.kill(os.getpid(), number)
            assert acted == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_in_the_same_step(
    number: signal.Signals, dataset_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    values = job(dataset_folder, run, train={"steps": 4000}, plan={"shard": "weights"})
    process = start(values, tmp_path, "--processes", "2")
    wait_for_steps(run, 3, process)
    os.kill(ranks(process.pid)[-1], number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    assert "another process was told to stop" in error
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.name == f"step-{last:08}"
    assert (newest / "optimizer-00002-of-00002.safetensors").is_file()
    assert json.loads((run / "summary.json").read_bytes())["status"] == "resumable"


def processes_under(parent: int) -> set[int]:
    """All that a process has started, and they again."""
    found: set[int] = set()
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found |= {child, *processes_under(child)}
    return found


def without_kernels(folder: Path) -> dict[str, str]:
    """An environment with a cache that knows this machine's speed, and nothing else."""
    cache = Path(os.environ["XDG_CACHE_HOME"], "penstock", "probe")
    if cache.is_dir():
        shutil.copytree(cache, folder / "cache" / "penstock" / "probe")
    return {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, -signal.SIGTERM), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_while_kernels_are_compiled_ends_at_once_and_leaves_nothing_broken(
    number: signal.Signals, code: int, dataset_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    values = {**job(dataset_folder, run, train={"steps": 4}), "compile": {}}
    environment = without_kernels(tmp_path)
    (tmp_path / "job.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "penstock", "train", "--config", str(tmp_path / "job.yaml")]
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 100
    while not (started := processes_under(process.pid)) and process.poll() is None:
        assert time.monotonic() < deadline, "nothing was compiled"
        time.sleep(0.05)
    time.sleep(1)
    started |= processes_under(process.pid)
    process.send_signal(number)
    sent = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code, error
    assert time.monotonic() - sent < 10
    assert "Traceback" not in error
    while any(Path(f"/proc/{child}").exists() for child in started):
        assert time.monotonic() < sent + 30, "a compiling process was left behind"
        time.sleep(0.05)
    assert not list_checkpoints(run / "checkpoints")
    assert not (run / "summary.json").exists()
    # Nothing is in the way of the same run; the compiler itself is needed elsewhere.
    penstock.train(**{**values, "compile": {"mode": "off"}})
    assert [path.name for path in list_checkpoints(run / "checkpoints")][-1:] == ["step-00000004"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiling_killed_again_and_again_leaves_kernels_that_train_alike(
    dataset_folder: Path, tmp_path: Path
) -> None:
    def values(name: str) -> dict:
        return {**job(dataset_folder, tmp_path / name, train={"steps": 4}), "compile": {}}

    environment = without_kernels(tmp_path)
    command = [sys.executable, "-m", "penstock", "train", "--config", str(tmp_path / "job.yaml")]
    (tmp_path / "job.yaml").write_text(json.dumps(values("killed")))
    chance = random.Random(3)
    kills = 0
    for _ in range(8):
        process = subprocess.Popen(
            command, env=environment, start_new_session=True,
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not processes_under(process.pid) and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 12))
        kills += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills >= 4
    assert subprocess.run(command, env=environment, check=False, timeout=300).returncode == 0
    penstock.train(**values("calm"))
    assert_same_bits(tmp_path / "killed", tmp_path / "calm")
