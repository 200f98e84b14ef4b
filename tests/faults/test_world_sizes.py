"""One run handed from one number of processes to another, and one of four processes lost."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import penstock
from penstock.data.sample_log import read_sample_log
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import (
    assert_close,
    assert_same_bits,
    job,
    ranks,
    run_jobs,
    start,
    wait_for_steps,
)

SIZES = (1, 2, 4, 3, 1)
EACH = 3
BATCH = {"micro": 1, "size": 12}
"""A size that one, two, three and four processes can share."""


def shared(dataset: Path, run: Path, steps: int) -> dict:
    train = {"steps": steps, "evaluate_every": None, "log_samples": True}
    schedule = {"name": "constant", "warmup": 2}
    more = {"batch": BATCH, "plan": {"shard": "weights"}, "schedule": schedule}
    return job(dataset, run, train=train, **more)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_one_to_two_to_four_to_three_to_one_every_sample_is_taken_once(
    dataset_folder: Path, tmp_path: Path
) -> None:
    calm, run = tmp_path / "calm", tmp_path / "run"
    penstock.train(**shared(dataset_folder, calm, EACH * len(SIZES)))
    for part, size in enumerate(SIZES, start=1):
        values = shared(dataset_folder, run, EACH * part)
        if size == 1:
            penstock.train(**values)
        else:
            run_jobs([values], tmp_path, processes=size)
    expected = read_sample_log(calm / "samples")
    assert [number for number, _ in expected] == list(range(12 * EACH * len(SIZES)))
    assert read_sample_log(run / "samples") == expected
    files = sorted(path.name for path in (run / "samples").iterdir())
    assert files == [f"rank-0000{rank}.jsonl" for rank in range(4)]
    losses = [
        [r["loss"] for r in read_metrics(path / "metrics.jsonl") if "loss" in r]
        for path in (run, calm)
    ]
    assert len(losses[0]) == EACH * len(SIZES)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shard", ["none", "weights"])
def test_one_of_four_killed_ends_the_others_and_costs_no_bit(
    shard: str,
    dataset_folder: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    def values(name: str) -> dict:
        train = {"steps": 24, "evaluate_every": 12}
        return job(dataset_folder, tmp_path / name, train=train, batch=BATCH, plan={"shard": shard})

    run_jobs([values("calm")], tmp_path, processes=4)
    process = start(values("hit"), tmp_path, "--processes", "4")
    wait_for_steps(tmp_path / "hit", 6, process)
    children = ranks(process.pid)
    assert len(children) == 4
    os.kill(children[2], signal.SIGKILL)
    killed = time.monotonic()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < killed + 60, "the survivors hang"
        time.sleep(0.02)
    record_property("seconds until all had ended", round(time.monotonic() - killed, 2))
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    assert "SIGKILL" in error
    assert "all start again (1 of 3)" in error
    assert_same_bits(tmp_path / "hit", tmp_path / "calm")
    penstock.train(**{**values("alone"), "plan": {}})
    assert_close(tmp_path / "hit", tmp_path / "alone")
