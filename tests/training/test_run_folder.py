"""One process at a time writes a run; resuming follows the policy."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from penstock.checkpoint import CheckpointState, save_checkpoint
from penstock.errors import CheckpointError
from penstock.training.run_folder import RunFolder

HOLD_THE_LOCK = """
import sys, time
from penstock.training.run_folder import RunFolder
lock = RunFolder(sys.argv[1]).lock()
print("locked", flush=True)
time.sleep(600)
"""


def save(run: RunFolder, step: int) -> Path:
    state = CheckpointState(step, {"master.x": torch.full((3,), float(step))}, {})
    return save_checkpoint(run.checkpoints, state)


def test_paths_are_where_users_look_for_them(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    found = {path.relative_to(run.path).as_posix() for path in vars(run).values()}
    assert found >= {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "tensorboard",
        "report.html",
        "loss.png",
    }
    assert not run.path.exists()


def test_a_run_held_by_another_process_is_refused_until_that_is_killed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError) as caught:
            run.lock()
        message = str(caught.value)
        assert f"{run.path} is in use by process {process.pid} " in message
        assert "\n" not in message
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_the_same_process_cannot_take_a_run_twice_but_one_after_the_other(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.lock(), pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} "):
        run.lock()
    run.lock().release()
    run.lock().release()


def test_of_many_threads_at_once_exactly_one_gets_the_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    locks, refusals = [], []
    barrier = threading.Barrier(8)

    def take() -> None:
        barrier.wait()
        try:
            locks.append(run.lock())
        except CheckpointError as error:
            refusals.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(locks), len(refusals)) == (1, 7)
    locks[0].release()


def test_a_lock_file_with_rubbish_in_it_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff\xfe 12")
    run = RunFolder(tmp_path)
    with run.lock(), pytest.raises(CheckpointError, match="in use"):
        run.lock()


@pytest.mark.parametrize("place", ["file", "file/inside", "/proc/no/such/place"])
def test_a_place_where_no_folder_can_be_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be a run folder") as caught:
        RunFolder(tmp_path / place).lock()
    assert "\n" not in str(caught.value)


def test_auto_goes_on_from_the_newest_and_starts_afresh_without_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.resume_state("auto") is None
    save(run, 3)
    save(run, 5)
    state = run.resume_state("auto")
    assert state is not None
    assert state.step == 5


def test_must_fails_without_a_checkpoint_and_never_with_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint to resume.*checkpoint\.resume=must"):
        run.resume_state("must")
    assert run.resume_state("never") is None
    path = save(run, 3)
    state = run.resume_state("must")
    assert state is not None
    assert state.step == 3
    with pytest.raises(CheckpointError, match="already has checkpoints"):
        run.resume_state("never")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="already has checkpoints"):
        run.resume_state("never")
    for policy in ("auto", "must"):
        with pytest.raises(CheckpointError, match="none of the 1 checkpoints is whole"):
            run.resume_state(policy)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match="not a run with a checkpoint"):
        run.require()
    run.config.write_text("seed: 1\n")
    with pytest.raises(CheckpointError, match="not a run with a checkpoint"):
        run.require()
    save(run, 1)
    run.require()
