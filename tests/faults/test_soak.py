"""Thousands of steps, and generating again and again: nothing grows, nothing is lost."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penstock.checkpoint import best_checkpoint, list_checkpoints
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import job

STEPS = 2000
FIXTURE = sorted((Path(__file__).resolve().parents[1] / "fixtures").iterdir())[-1]


def held(process: int) -> dict[str, float]:
    """What a process has of the machine now."""
    folder = Path(f"/proc/{process}")
    status = dict(
        line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line
    )
    return {
        "resident KiB": float(status["VmRSS"].split()[0]),
        "threads": float(status["Threads"]),
        "descriptors": float(len(os.listdir(folder / "fd"))),
    }


def growth(samples: list[tuple[float, float]]) -> float:
    """Least-squares slope over the last two thirds, times their length: what was added."""
    kept = np.array(samples[len(samples) // 3 :])
    slope = np.polyfit(kept[:, 0], kept[:, 1], 1)[0]
    return float(slope * (kept[-1, 0] - kept[0, 0]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_long_run_holds_no_more_at_its_end_than_after_its_warm_up(
    dataset_folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run = tmp_path / "run"
    train = {"steps": STEPS, "evaluate_every": 100, "evaluate_sequences": 4, "tensorboard": True}
    values = job(
        dataset_folder, run, train=train, batch={"micro": 2, "size": 2},
        checkpoint={"every": 25, "keep": 3},
    )  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "penstock", "train", "--config", str(tmp_path / "job.yaml")]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    found: dict[str, list[tuple[float, float]]] = {}
    disk: list[float] = []
    started = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if not list_checkpoints(run / "checkpoints"):
            continue
        try:
            now = held(process.pid)
        except (OSError, KeyError):  # It has just ended.
            break
        for name, value in now.items():
            found.setdefault(name, []).append((time.monotonic() - started, value))
        folders = list((run / "checkpoints").iterdir())
        disk.append(len(folders))
    assert process.wait(120) == 0, (tmp_path / "said").read_text()
    assert len(disk) > 60
    grown = {name: growth(samples) for name, samples in found.items()}
    record_property("grown", {name: round(value, 2) for name, value in grown.items()})
    assert grown["resident KiB"] < 4 << 10
    assert abs(grown["threads"]) < 0.5
    assert abs(grown["descriptors"]) < 1.5
    # Three, the best, one that is written, one that is removed.
    assert max(disk) <= 6
    kept = list_checkpoints(run / "checkpoints")
    best = best_checkpoint(run / "checkpoints")
    assert {path.name for path in kept} == {
        *(f"step-{step:08}" for step in (STEPS - 50, STEPS - 25, STEPS)),
        best.name if best else "",
    }
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [*range(1, STEPS + 1)]
    assert [r["step"] for r in records if "validation_loss" in r] == [*range(100, STEPS + 1, 100)]


GENERATE = """
import json, sys
import penstock
from penstock.console import set_console
from penstock.hardware.process import prepare_process
from tests.faults.test_soak import held
import os
prepare_process()
set_console(quiet=True)
texts = set()
for turn in range(int(sys.argv[2])):
    result = penstock.generate(run=sys.argv[1], generate={"prompt": "3 times", "tokens": 8})
    texts.add(result.completions[0].text)
    print(json.dumps(held(os.getpid())), flush=True)
assert len(texts) == 1, texts
"""


@pytest.mark.slow
def test_generating_again_and_again_holds_no_more(
    record_property: Callable[[str, object], None],
) -> None:
    command = [sys.executable, "-c", GENERATE, str(FIXTURE / "run"), "150"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=280,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    samples = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(samples) == 150
    grown = {name: growth([(n, s[name]) for n, s in enumerate(samples)]) for name in samples[0]}
    record_property("grown", {name: round(value, 2) for name, value in grown.items()})
    assert grown["resident KiB"] < 2 << 10
    assert abs(grown["threads"]) < 0.5
    assert abs(grown["descriptors"]) < 0.5
