"""A disk that is full while a run trains: it trains on, says so, and is whole when there is room.

Single calls that fail are in `test_crash_points.py`, disks that are full from the start in
`test_limits.py`.
"""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock
from penstock.checkpoint import list_checkpoints, load_newest
from penstock.cli import main
from penstock.compiler.executable import Executable
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import (
    assert_same_bits,
    job,
    ranks,
    run_jobs,
    start,
    wait_for_steps,
)

STEPS = 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    make = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(mount)]
    if subprocess.run(make, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free; the file that does it."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(disk).free < 4096
    return filler


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@contextlib.contextmanager
def train_aside(values: dict, folder: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """One process, and what it says; it does not outlive the test."""
    (folder / "job.yaml").write_text(json.dumps(values))
    log = folder / "said"
    command = [sys.executable, "-m", "penstock", "train", "--config", str(folder / "job.yaml")]
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def lasting(dataset: Path, run: Path, **more: object) -> dict:
    train = {"steps": STEPS, "evaluate_every": 30, "tensorboard": True, "log_samples": True}
    return job(dataset, run, train={**train, **more.pop("train", {})}, **more)


def test_training_goes_on_with_a_full_disk_and_saves_when_there_is_room(
    small_disk: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    calm, run = tmp_path / "calm", small_disk / "run"
    penstock.train(**lasting(dataset_folder, calm))
    with train_aside(lasting(dataset_folder, run), tmp_path) as (process, log):
        while len(list_checkpoints(run / "checkpoints")) < 2:
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        filler = fill(small_disk)
        wait_for("could not be written: the disk is full", log, process)
        wait_for("metrics.jsonl waits for room", log, process)
        newest = load_newest(run / "checkpoints")
        assert newest is not None
        assert newest.step < STEPS
        filler.unlink()
        assert process.wait(120) == 0, log.read_text()
    said = log.read_text()
    assert "training goes on without it" in said
    assert "metrics.jsonl waits for room: No space left on device; training goes on" in said
    assert "Traceback" not in said
    failed = json.loads((run / "summary.json").read_bytes())["failed_saves"]
    assert failed == said.count("could not be written: the disk is full") > 0
    assert not list((run / "checkpoints").glob(".*"))
    # Nothing was lost: neither a bit, nor a line of the metrics or of the samples.
    assert_same_bits(run, calm)
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r] == [
        *range(1, STEPS + 1)
    ]
    samples = "samples/rank-00000.jsonl"
    assert (run / samples).read_bytes() == (calm / samples).read_bytes()


def test_a_last_checkpoint_without_room_is_one_line_and_the_same_command_goes_on(
    small_disk: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    run = small_disk / "run"
    with train_aside(lasting(dataset_folder, run), tmp_path) as (process, log):
        while not list_checkpoints(run / "checkpoints"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        filler = fill(small_disk)
        assert process.wait(120) == 2
    last = log.read_text().splitlines()[-1]
    assert last.startswith("penstock: the ")
    assert "make room and start again with the same command" in last
    kept = list_checkpoints(run / "checkpoints")
    assert kept
    assert not list((run / "checkpoints").glob(".*"))
    filler.unlink()
    penstock.train(**lasting(dataset_folder, run))
    penstock.train(**lasting(dataset_folder, tmp_path / "calm"))
    assert_same_bits(run, tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_a_part_that_one_process_cannot_write_is_told_by_the_first(
    on_error: str, dataset_folder: Path, tmp_path: Path
) -> None:
    calm, run = tmp_path / "calm", tmp_path / "run"
    shard = {"plan": {"shard": "weights"}, "checkpoint": {"every": 4, "on_error": on_error}}
    run_jobs([lasting(dataset_folder, calm, **shard)], tmp_path)
    process = start(lasting(dataset_folder, run, **shard), tmp_path, "--processes", "2")
    wait_for_steps(run, 6, process)
    child = ranks(process.pid)[-1]
    # The second process alone may write no file larger than this.
    before = resource.prlimit(child, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    step = len(read_metrics(run / "metrics.jsonl"))
    with contextlib.suppress(ProcessLookupError):
        while len(read_metrics(run / "metrics.jsonl")) < step + 12 and process.poll() is None:
            time.sleep(0.01)
        resource.prlimit(child, resource.RLIMIT_FSIZE, before)
    error = process.communicate(timeout=120)[1]
    if on_error == "stop":
        assert process.returncode == 2, error
        [line] = [text for text in error.splitlines() if text.startswith("penstock")]
        assert "the disk is full" in line
        process = start(lasting(dataset_folder, run, **shard), tmp_path, "--processes", "2")
        assert process.wait(120) == 0
    else:
        assert process.returncode == 0, error
        assert "process 2 of 2: the disk is full" in error
        assert "training goes on without it" in error
        assert json.loads((run / "summary.json").read_bytes())["failed_saves"] >= 1
    assert not list((run / "checkpoints").glob(".*"))
    assert_same_bits(run, calm)
    assert not any(
        Path(f"/proc/{pid}").exists() for pid in (child, process.pid) if pid != os.getpid()
    )


@pytest.mark.slow
@pytest.mark.parametrize("full", ["executable", "cache"])
def test_compiling_on_a_full_disk_leaves_the_old_executable_and_the_cache_as_they_were(
    full: str, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"executable": tmp_path, "cache": tmp_path, full: small_disk}
    path = folders["executable"] / "job.penstock"

    def compile_for(micro: int) -> int:
        return main(
            ["compile", "model.preset=gpt2-tiny", f"batch.micro={micro}", "--quiet", "compile.toolchain=eager",
             f"compile.cache={folders['cache'] / 'kernels'}", f"executable={path}"]
        )  # fmt: skip

    def kept() -> list[Path]:
        return sorted(file for file in small_disk.rglob("*") if file.is_file())

    assert compile_for(2) == 0
    old, files = path.read_bytes(), kept()
    filler = fill(small_disk)
    capsys.readouterr()
    status, said = compile_for(3), capsys.readouterr().err
    assert (status, said.count("No space left on device")) == (2, 1), said
    assert "Traceback" not in said
    filler.unlink()
    assert path.read_bytes() == old
    assert set(kept()) - set(files) <= {file for file in kept() if file.suffix == ".lock"}
    Executable.open(path).kernels()
    assert compile_for(3) == 0
    assert path.read_bytes() != old
