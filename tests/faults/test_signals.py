"""Signals that ask to stop, to one process of several: all save the same step and end well.

SIGTERM to a launcher: `tests/parallel/test_replicas.py`; to a run of one process:
`tests/end_to_end/test_resume.py`.
"""

import json
import os
import signal
from pathlib import Path

import pytest

from penstock.checkpoint import list_checkpoints
from penstock.training.metrics import read_metrics
from penstock.training.signals import StopSignals
from tests.parallel.test_replicas import job, ranks, start, wait_for_steps


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
