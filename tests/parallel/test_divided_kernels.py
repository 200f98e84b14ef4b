"""Region kernels in several processes, divided state, and who takes which sample."""

from pathlib import Path

import pytest

import penstock
from penstock.data.sample_log import read_sample_log
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import job, run_jobs

STEPS = 12


def losses(run: Path) -> list[float]:
    """Of every step, and its gradient norm; where a run was handed on it validates besides."""
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    assert len(records) == STEPS
    return [record[name] for record in records for name in ("loss", "grad_norm")]


def test_compiled_and_divided_runs_train_what_one_process_does_on_the_same_samples(
    tiny_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    def values(run: str, steps: int = STEPS, **more: object) -> dict:
        train = {"steps": steps, "log_samples": True}
        made = job(dataset_folder, tmp_path / run, train=train, **more)
        given = {k: v for k, v in made.items() if k not in ("model", "precision", "compile")}
        return given | {"batch": {"size": 8}, "executable": str(tiny_executable)}

    penstock.train(**values("alone"))
    jobs = [
        values("none"),
        values("weights", plan={"shard": "weights"}),
        values("handed on", plan={"shard": "weights"}, steps=8),
    ]
    # One process, two, and one again: the middle third of the run is made by two.
    penstock.train(**values("handed on", steps=4))
    run_jobs(jobs, tmp_path)
    penstock.train(**values("handed on"))
    expected = read_sample_log(tmp_path / "alone" / "samples")
    assert [number for number, _ in expected] == list(range(8 * STEPS))
    assert len({checksum for _, checksum in expected}) > 8 * STEPS * 0.9
    for run in ("none", "weights", "handed on"):
        assert read_sample_log(tmp_path / run / "samples") == expected
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    files = sorted(path.name for path in (tmp_path / "handed on" / "samples").iterdir())
    assert files == ["rank-00000.jsonl", "rank-00001.jsonl"]
