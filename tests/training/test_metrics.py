"""The metrics file says each thing once, whatever happens; figures follow from a clock."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from penstock.errors import CheckpointError
from penstock.training.metrics import (
    MetricsLog,
    Throughput,
    peak_memory_bytes,
    peak_resident_bytes,
    read_metrics,
)


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def open_log(path: Path, resume_step: int = 0) -> MetricsLog:
    return MetricsLog(path, resume_step=resume_step, tensorboard=None)


def test_every_line_is_there_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with open_log(path) as log:
        log.log(1, {"loss": 2.5, "lr": 1e-3, "tokens": 128})
        assert path.read_text() == '{"step": 1, "loss": 2.5, "lr": 0.001, "tokens": 128}\n'
        log.sync()
        log.log(2, {"loss": 1 / 3})
        assert read_metrics(path)[1] == {"step": 2, "loss": 1 / 3}


def test_numbers_that_are_not_finite_are_null_so_that_every_line_is_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_log(path) as log:
        log.log(1, {"loss": math.nan, "grad_norm": math.inf, "mfu": None})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "mfu": None,
    }


def test_resuming_drops_the_steps_that_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_log(path) as log:
        for step in range(1, 8):
            log.log(step, {"loss": 10.0 / step})
    with open_log(path, resume_step=4) as log:
        assert [m["step"] for m in read_metrics(path)] == [1, 2, 3, 4]
        for step in range(5, 8):
            log.log(step, {"loss": 10.0 / step})
    records = read_metrics(path)
    assert records == [{"step": step, "loss": 10.0 / step} for step in range(1, 8)]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    open_log(path).close()
    assert path.read_text() == ""


def test_a_run_started_again_at_its_end_says_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_log(path) as log:
        log.log(4, {"loss": 2.0})
        log.log(4, {"validation_loss": 2.1})
    with open_log(path, resume_step=4) as log:
        log.log(4, {"validation_loss": 2.1})
        log.log(4, {"perplexity": 8.2})
    assert read_metrics(path) == [
        {"step": 4, "loss": 2.0},
        {"step": 4, "validation_loss": 2.1},
        {"step": 4, "perplexity": 8.2},
    ]


@given(cut=st.integers(0, 200), resume=st.integers(0, 6))
def test_a_file_cut_anywhere_goes_on_with_no_step_twice(
    tmp_path_factory: pytest.TempPathFactory, cut: int, resume: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    whole = "".join(f'{{"step": {step}, "loss": {step / 7}}}\n' for step in range(1, 7))
    path.write_text(whole[:cut])
    with open_log(path, resume_step=resume) as log:
        for step in range(resume + 1, 7):
            log.log(step, {"loss": step / 7})
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1:] == ([6] if resume < 6 else steps[-1:])


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}', b"\xff\xfe", b"[1]", b'{"step": "2"}', b'{"step": true}', b'{"loss":']
    path.write_bytes(b"\n".join([*lines, b"[" * 100_000, b'{"step": 3}']))
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert read_metrics(tmp_path / "none") == []


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    board = tmp_path / "tensorboard"
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=0, tensorboard=board) as log:
        for step in range(1, 4):
            log.log(step, {"loss": 1.5 * step, "mfu": None})
    events = EventAccumulator(str(board)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.5), (2, 3.0), (3, 4.5)]


def test_tensorboard_forgets_the_steps_done_again(tmp_path: Path) -> None:
    board, path = tmp_path / "tensorboard", tmp_path / "metrics.jsonl"
    with MetricsLog(path, resume_step=0, tensorboard=board) as log:
        for step in range(1, 6):
            log.log(step, {"loss": 1.0})
    time.sleep(1.1)  # Event files are named by the second.
    with MetricsLog(path, resume_step=3, tensorboard=board) as log:
        log.log(4, {"loss": 2.0})
    events = EventAccumulator(str(board)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
    ]


def test_lines_a_full_disk_has_no_room_for_are_written_when_it_has(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    try:
        (mount / "filler").write_bytes(bytes(40 << 10))
        path = mount / "metrics.jsonl"
        log = open_log(path)
        for step in range(1, 1001):
            log.log(step, {"loss": 1 / 3})
        whole = [m["step"] for m in read_metrics(path)]
        assert whole == list(range(1, len(whole) + 1))
        assert 100 < len(whole) < 1000
        log.sync()
        with pytest.raises(CheckpointError, match="No space left") as caught:
            log.sync(last=True)
        assert "\n" not in str(caught.value)
        [line] = capfd.readouterr().err.splitlines()
        assert "waits for room: No space left on device; training goes on" in line
        (mount / "filler").unlink()
        log.sync(last=True)
        assert [m["step"] for m in read_metrics(path)] == list(range(1, 1001))
        log.log(1001, {"loss": 1 / 3})
        log.close()
        assert read_metrics(path)[-1]["step"] == 1001
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_a_file_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="metrics could not be written"):
        open_log(tmp_path / "run" / "metrics.jsonl")


# Figures


def measure(seconds: list[float], clock: FakeClock, meter: Throughput, tokens: int = 100) -> None:
    for duration in seconds:
        meter.start()
        clock.now += duration
        assert meter.stop(tokens) == pytest.approx(duration)


def make_meter(clock: FakeClock, warmup_steps: int = 2) -> Throughput:
    return Throughput(warmup_steps=warmup_steps, flops_per_token=6_000, peak_flops=1e6, clock=clock)


def test_waiting_for_data_is_a_part_of_the_steps_after_the_warm_up() -> None:
    clock = FakeClock()
    meter = make_meter(clock, warmup_steps=1)
    assert meter.waiting_share is None
    for waiting, working in ((5.0, 1.0), (1.0, 3.0), (0.0, 4.0)):
        meter.start()
        clock.now += waiting
        meter.data_ready()
        assert meter.data_seconds == pytest.approx(waiting)
        clock.now += working
        meter.stop(100)
    assert meter.waiting_share == pytest.approx(1 / 8)


def test_no_figure_is_shown_before_the_warm_up_is_over() -> None:
    clock = FakeClock()
    meter = make_meter(clock)
    measure([9.0, 7.0], clock, meter)
    assert meter.step_seconds == pytest.approx(7.0)
    figures = (meter.tokens_per_second, meter.mean_tokens_per_second, meter.mfu)
    assert figures == (None, None, None)
    assert meter.remaining_seconds(10) is None


def test_figures_after_the_warm_up_follow_from_the_clock() -> None:
    clock = FakeClock()
    meter = make_meter(clock)
    measure([9.0, 7.0, 2.0, 1.0, 2.0], clock, meter)
    assert meter.tokens_per_second == pytest.approx(100 / 2.0)
    assert meter.mean_tokens_per_second == pytest.approx(300 / 5.0)
    assert meter.mfu == pytest.approx(50 * 6_000 / 1e6)
    assert meter.remaining_seconds(10) == pytest.approx(20.0)
    assert meter.remaining_seconds(0) == 0
    assert (meter.counted_tokens, meter.counted_seconds) == (300, pytest.approx(5.0))


def test_time_between_steps_does_not_count() -> None:
    clock = FakeClock()
    meter = make_meter(clock, warmup_steps=0)
    for _ in range(4):
        measure([0.5], clock, meter)
        clock.now += 100.0  # Validation, a checkpoint.
    assert meter.mean_tokens_per_second == pytest.approx(200.0)
    assert meter.tokens_per_second == pytest.approx(200.0)


def test_one_slow_step_does_not_move_the_shown_speed_and_old_ones_are_forgotten() -> None:
    clock = FakeClock()
    meter = make_meter(clock, warmup_steps=0)
    measure([1.0, 1.0, 60.0, 1.0], clock, meter)
    assert meter.tokens_per_second == pytest.approx(100.0)
    measure([4.0] * 50, clock, meter)
    assert meter.tokens_per_second == pytest.approx(25.0)


def test_memory_is_what_this_process_held_not_what_its_parent_did() -> None:
    size = 768 << 20
    ballast = bytearray(size)
    ballast[::4096] = b"x" * len(ballast[::4096])
    here = peak_memory_bytes(torch.device("cpu"))
    command = (
        "import sys; from penstock.training.metrics import peak_resident_bytes as peak;"
        "sys.stdout.write(str(peak()))"
    )
    child = subprocess.run([sys.executable, "-c", command], capture_output=True, check=True)
    there = int(child.stdout)
    del ballast
    assert size < here
    assert 1 << 20 < there < size
    assert peak_resident_bytes() >= here - (1 << 20)
