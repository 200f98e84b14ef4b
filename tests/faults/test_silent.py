"""Processes that hang, that are slow, and clocks and disks that misbehave."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from penstock.parallel.watch import Pace
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import (
    assert_same_bits,
    figures,
    job,
    ranks,
    start,
    wait_for_steps,
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_alone(values: dict, folder: Path, size: int = 2) -> list[subprocess.Popen]:
    """Each process by itself, as srun and mpirun start them: no launcher ends the others."""
    file = folder / "job.yaml"
    file.write_text(json.dumps(values))
    given = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    given |= {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    command = [sys.executable, "-m", "penstock", "train", "--config", str(file)]
    return [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **{k: str(v) for k, v in given.items()},
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def test_who_waits_for_a_stopped_process_names_it_and_says_where_it_stood(
    dataset_folder: Path, tmp_path: Path
) -> None:
    values = job(dataset_folder, tmp_path / "run", train={"steps": 100_000})
    first, second = start_alone({**values, "launch": {"timeout_seconds": 4}}, tmp_path)
    try:
        wait_for_steps(tmp_path / "run", 3, first)
        second.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        error = first.communicate(timeout=120)[1]
        waited = time.monotonic() - stopped
    finally:
        second.kill()
        second.communicate()
    [line] = [text for text in error.splitlines() if text.startswith("penstock")]
    assert first.returncode == 1
    assert "rank 0 lost rank 1: " in line
    assert waited > 4
    stacks = tmp_path / "run" / "stacks" / "rank-00000.txt"
    assert str(stacks) in line
    assert "train_step" in stacks.read_text()


@pytest.mark.slow
def test_a_stopped_process_costs_a_restart_and_no_bit(dataset_folder: Path, tmp_path: Path) -> None:
    run, values = tmp_path / "run", job(dataset_folder, tmp_path / "run", train={"steps": 40})
    process = start(values, tmp_path, "--processes", "2", "launch.timeout_seconds=5")
    wait_for_steps(run, 5, process)
    os.kill(ranks(process.pid)[-1], signal.SIGSTOP)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    assert "lost rank 1" in error
    assert "all start again (1 of 3)" in error
    calm = job(dataset_folder, tmp_path / "calm", train={"steps": 40})
    process = start(calm, tmp_path, "--processes", "2")
    assert process.wait(300) == 0
    assert_same_bits(run, tmp_path / "calm")


@pytest.mark.slow
def test_a_slow_process_is_named(dataset_folder: Path, tmp_path: Path) -> None:
    values = job(dataset_folder, tmp_path / "run", train={"steps": 200, "evaluate_every": 200})
    process = start({**values, "checkpoint": {"every": None}}, tmp_path, "--processes", "2")
    wait_for_steps(tmp_path / "run", 3, process)
    victim, done = ranks(process.pid)[-1], threading.Event()

    def hinder() -> None:
        """It gets a fifth of the time."""
        while not done.is_set():
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.04)
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.01)

    thread = threading.Thread(target=hinder)
    thread.start()
    try:
        wait_for_steps(tmp_path / "run", 120, process)
    finally:
        done.set()
        thread.join()
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert "rank 1 is slow" in error, error
    assert "rank 0 is slow" not in error


def test_the_slow_one_of_many_is_named_once_and_noise_is_not() -> None:
    pace = Pace(4)
    even = [pace.straggler([0.1, 0.11, 0.1, 0.13]) for _ in range(60)]
    assert even == [None] * 60
    said = [pace.straggler([0.1, 0.1, 0.25, 0.1]) for _ in range(60)]
    assert sum(text is not None for text in said) == 1
    assert "rank 2 is slow: 0.25 s" in (said[19] or "")
    # A single long step, as while a checkpoint is written, is no habit.
    assert all(
        pace.straggler([0.1, 0.1 + (n % 20 == 0) * 0.5, 0.1, 0.1]) is None for n in range(40)
    )


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <sys/time.h>
/* The wall clock jumps a day forth or back whenever it is asked; the others go on. */
static long jump(void) { static long asked; return (asked++ % 2 ? 86400 : -86400); }
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME && !result) now->tv_sec += jump();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int result = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec; now->tv_usec = exact.tv_nsec / 1000;
    return result;
}
time_t time(time_t *out) {
    struct timespec exact; clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}
"""
TELL_TIME = "import time; t = [time.time() for _ in range(4)]; print(max(t) - min(t) > 86400)"


def under(command: list[str], values: dict, folder: Path, **environment: str) -> None:
    """Train under something that interferes."""
    file = folder / f"{Path(values['run']).name}.yaml"
    file.write_text(json.dumps(values))
    words = [*command, sys.executable, "-m", "penstock", "train", "--config", str(file)]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_jumping_clocks_and_slow_disks_change_no_bit(dataset_folder: Path, tmp_path: Path) -> None:
    jobs = {n: job(dataset_folder, tmp_path / n) for n in ("calm", "clock", "disk")}
    under([], jobs["calm"], tmp_path)
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    if subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=False
    ).returncode:
        pytest.skip("no C compiler")
    jumping = {"LD_PRELOAD": str(library)}
    told = subprocess.run(
        [sys.executable, "-c", TELL_TIME],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **jumping},
    )
    assert told.stdout.strip() == "True"
    under([], jobs["clock"], tmp_path, **jumping)
    assert_same_bits(tmp_path / "clock", tmp_path / "calm")
    # Every fsync takes half a second: checkpoints are late, training is not, nothing is lost.
    slow = [
        "strace",
        "-f",
        "-q",
        "-o",
        "/dev/null",
        "-e",
        "trace=fsync",
        "--inject=fsync:delay_exit=500000",
    ]
    if subprocess.run([*slow, "true"], check=False).returncode:
        pytest.skip("strace is not here, or may not trace")
    started = time.monotonic()
    under(slow, jobs["disk"], tmp_path)
    assert time.monotonic() - started > 5
    assert_same_bits(tmp_path / "disk", tmp_path / "calm")
    assert len(figures(tmp_path / "disk")) == len(figures(tmp_path / "calm"))
    steps = [
        r["step_seconds"] for r in read_metrics(tmp_path / "disk" / "metrics.jsonl") if "loss" in r
    ]
    assert len(steps) == 12
