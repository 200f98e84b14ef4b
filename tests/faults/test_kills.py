"""kill -9 of one process, of all, or of the launcher, whenever it comes: the same bits in the end.

The sample of this that `make test` runs is in `tests/parallel/test_replicas.py`.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parallel.test_replicas import assert_same_bits, job, ranks, run_jobs, start

STEPS = 60
VICTIMS = ("a process", "all processes", "the launcher")


def long_job(dataset: Path, run: Path, **more: object) -> dict:
    """A checkpoint every other step, so that many kills come while one is written."""
    steps = {"train": {"steps": STEPS, "evaluate_every": 20, **more.pop("train", {})}}
    return job(dataset, run, **steps, checkpoint={"every": 2, "keep": 3}, **more)


def kill(victim: str, launcher: int, chance: random.Random) -> None:
    """Kill -9; a process that has just ended by itself is no matter."""
    children = ranks(launcher)
    chosen = {"a process": [chance.choice(children or [launcher])], "all processes": children}
    for process in chosen.get(victim, [launcher]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def alive(processes: list[int]) -> list[int]:
    """Which of them still run; one that waits to be reaped does not."""
    found = []
    for process in processes:
        status = Path(f"/proc/{process}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
            found.append(process)
    return found


def train_under_fire(values: dict, folder: Path, victims: list[str], seed: int) -> tuple[int, int]:
    """Start the job, kill, and start it again while it needs that; returns kills, and how many
    left a half-written checkpoint.
    """
    chance, run = random.Random(seed), Path(values["run"])
    kills = inside = 0
    left = list(victims)
    while True:
        process = start(values, folder, "--processes", "2", "launch.restarts=100")
        while left and process.poll() is None:
            before = (run / "metrics.jsonl").stat().st_size if kills or run.exists() else 0
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
                log = run / "metrics.jsonl"
                if log.exists() and log.stat().st_size != before:
                    break
            time.sleep(chance.uniform(0, 0.3))
            if process.poll() is not None:
                break
            children, victim = ranks(process.pid), left.pop()
            kill(victim, process.pid, chance)
            kills += 1
            inside += bool(list((run / "checkpoints").glob(".step-*.tmp")))
            if victim == "the launcher":
                process.wait(30)
                deadline = time.monotonic() + 10
                while alive(children) and time.monotonic() < deadline:
                    time.sleep(0.02)
                assert not alive(children), "processes outlived their launcher"
        error = process.communicate(timeout=300)[1]
        if process.returncode == 0:
            return kills, inside
        assert process.returncode == -signal.SIGKILL, error


@pytest.fixture(scope="module")
def calm(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    jobs = [
        long_job(dataset_folder, folder / shard, plan={"shard": shard})
        for shard in ("none", "weights")
    ]
    run_jobs(jobs, folder)
    return folder


@pytest.mark.slow
def test_each_kind_of_kill_costs_no_bit(calm: Path, dataset_folder: Path, tmp_path: Path) -> None:
    values = long_job(dataset_folder, tmp_path / "run", plan={"shard": "weights"})
    kills, _ = train_under_fire(values, tmp_path, list(VICTIMS), seed=0)
    assert kills >= 2
    assert_same_bits(tmp_path / "run", calm / "weights")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_change_no_bit(
    calm: Path,
    dataset_folder: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    chance = random.Random(5)
    kills = inside = attempt = 0
    while kills < 50:
        shard = ("none", "weights")[attempt % 2]
        run = tmp_path / f"run-{attempt}"
        victims = chance.choices(VICTIMS, weights=(5, 3, 2), k=7)
        values = long_job(dataset_folder, run, plan={"shard": shard})
        more, torn = train_under_fire(values, tmp_path, victims, seed=attempt)
        assert_same_bits(run, calm / shard)
        kills, inside, attempt = kills + more, inside + torn, attempt + 1
    record_property("kills", f"{kills} over {attempt} runs, {inside} inside a save")
    assert inside >= 2, "no kill came while a checkpoint was written"
