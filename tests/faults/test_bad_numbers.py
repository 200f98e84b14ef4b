"""Infinite gradients in one process of several: all skip the step, and count, and stop alike.

The policy itself is tested in `tests/training/test_guard.py`.
"""

import json
import math
from pathlib import Path

import pytest

from penstock.checkpoint import list_checkpoints, load_checkpoint
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import job, state
from tests.processes import torchrun

CHILD = """
import json, os, sys, torch, penstock
from penstock.hardware.process import prepare_process
prepare_process()
from penstock import jobs
from penstock.errors import UserError

rank = int(os.environ.get("RANK", 0))
real = jobs.new_model

def infected(model, what, when, value):
    # The gradient one process's own data give one weight, or its loss, in some steps of two passes.
    seen = {"passes": 0}
    def spoil(figure):
        seen["passes"] += 1
        return figure * value if (seen["passes"] - 1) // 2 in when else figure
    if what == "loss":
        model.register_forward_hook(lambda model, given, loss: spoil(loss))
    else:
        next(iter(model.parameters())).register_hook(spoil)

for job, what, when, value in json.load(open(sys.argv[1])):
    def new_model(*arguments, **named):
        model, masters = real(*arguments, **named)
        if rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            infected(model, what, when, float(value))
        return model, masters
    jobs.new_model = new_model
    try:
        penstock.train(**job)
    except UserError as error:
        print(error)
"""


def test_one_process_with_infinite_gradients_makes_all_skip_count_and_stop(
    dataset_folder: Path, tmp_path: Path
) -> None:
    def values(name: str, bad_steps: int, **more: object) -> dict:
        train = {"steps": 8, "evaluate_every": None, "bad_steps": bad_steps, **more}
        every = {"every": 4 if "rollback_after" in more else 2}
        return job(dataset_folder, tmp_path / name, train=train, checkpoint=every)

    jobs = [
        (values("skipped", 3), "gradient", [2, 5], "inf"),
        (values("stopped", 1), "gradient", [2, 4, 6], "nan"),
        (values("alone", 0), "gradient", [], "1"),
        # Finite, but far above the running mean; before and after a restart.
        (values("spiked", 3, steps=24, spike_factor=5.0), "gradient", [22], "1000"),
        (values("spiked", 3, steps=27, spike_factor=5.0), "gradient", [1], "1000"),
        (values("loss spiked", 3, steps=24, loss_spike_factor=1.5), "loss", [22], "9"),
        # Two bad steps in a row, after the checkpoint of step 4 and one step more.
        (values("back", 5, rollback_after=2), "gradient", [5, 6], "inf"),
    ]
    processes = torchrun(CHILD, jobs, tmp_path)
    records = [r for r in read_metrics(tmp_path / "skipped" / "metrics.jsonl") if "loss" in r]
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [r["grad_norm"] is None for r in records] == [n in (2, 5) for n in range(8)]
    assert all(math.isfinite(r["loss"]) for r in records)
    assert all(bool(tensor.isfinite().all()) for tensor in state(tmp_path / "skipped").values())
    assert json.loads((tmp_path / "skipped" / "summary.json").read_bytes())["skipped_steps"] == 2
    assert all(process.out.count("2 steps were skipped") == 1 for process in processes)
    assert processes[0].out == processes[1].out
    assert all("step 23 (samples 176 to 183) skipped" in process.err for process in processes)
    assert_spikes_were_skipped(tmp_path / "spiked", factor=5.0, steps=[23, 26])
    # By its loss, which the log has as it was; by its norm nothing is a spike in this run.
    path = tmp_path / "loss spiked" / "metrics.jsonl"
    spiked = [r for r in read_metrics(path) if "loss" in r]
    assert [r["skipped"] for r in spiked] == [*[0] * 22, 1, 1]
    assert spiked[22]["loss"] > 3 * spiked[23]["loss"]
    # The last checkpoint is from before, and whole.
    newest = load_checkpoint(list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1])
    assert newest.step == 4
    assert newest.values["guard"]["skipped"] == 1
    # Up to the first bad step nothing differs from a run without one.
    calm = [r["loss"] for r in read_metrics(tmp_path / "alone" / "metrics.jsonl") if "loss" in r]
    assert [r["loss"] for r in records[:3]] == pytest.approx(calm[:3], rel=0)
    assert records[4]["loss"] != calm[4]
    # The samples that did it are named, in what the run ends with too.
    assert "step 5, samples 32 to 39; train.bad_steps is 1" in processes[0].out
    again = "weights and optimizer are those of step 4 again"
    assert all(process.err.count(again) == 1 for process in processes)


def assert_spikes_were_skipped(run: Path, *, factor: float, steps: list[int]) -> None:
    """By the closed form of the guard's limit, from the norms the run has logged."""
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == [*range(1, 28)]
    applied: list[float] = []
    for record in records:
        norm = record["grad_norm"]
        if record["step"] > 20:
            weights = [0.98**age for age in reversed(range(len(applied)))]
            mean = sum(w * n for w, n in zip(weights, applied, strict=True)) / sum(weights)
            assert (norm > factor * mean) == (record["step"] in steps)
        if record["step"] not in steps:
            applied.append(norm)
        assert record["skipped"] == sum(step <= record["step"] for step in steps)
    before, after = (load_checkpoint(list_checkpoints(run / "checkpoints")[i]) for i in (-2, -1))
    assert (before.values["guard"]["skipped"], after.values["guard"]["skipped"]) == (2, 2)
    assert after.values["guard"]["applied"] == 25
