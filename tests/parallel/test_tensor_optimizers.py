"""Optimizers of all kinds update blocks that are divided among processes as whole ones."""

from pathlib import Path

import pytest

import penstock
from tests.parallel.test_replicas import STEPS, figures, run_jobs, state
from tests.parallel.test_tensor import divided, whole

MUON = 5e-4
"""It orthogonalizes in bf16, where last bits of gradients become the last of 8: two replicas of
whole blocks differ from one process by 6e-5, parts by 1.1e-4; parts that orthogonalize what they
hold of a matrix, by 8e-3."""
OPTIMIZERS = ("nadam", "muon", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "radam")


def optimized(name: str, steps: int = STEPS) -> dict:
    return {"optimizer": {"name": name, "lr": 1e-3}, "train": {"steps": steps}}


@pytest.mark.parametrize(
    "names", [OPTIMIZERS[:2], pytest.param(OPTIMIZERS[2:], marks=pytest.mark.slow)]
)
def test_optimizers_of_parts_change_what_they_change_in_one_process(
    names: tuple[str, ...], dataset_folder: Path, tmp_path: Path
) -> None:
    jobs = []
    for name in names:
        penstock.train(**whole(dataset_folder, tmp_path / f"{name}-alone", **optimized(name)))
        # Handed on to two processes from one, then to one from two.
        short = optimized(name, STEPS // 3)
        penstock.train(**whole(dataset_folder, tmp_path / f"{name}-handed-on", **short))
        longer = optimized(name, 2 * STEPS // 3)
        jobs.append(divided(dataset_folder, tmp_path / name, **optimized(name)))
        jobs.append(divided(dataset_folder, tmp_path / f"{name}-handed-on", **longer))
    run_jobs(jobs, tmp_path)
    for name in names:
        penstock.train(**whole(dataset_folder, tmp_path / f"{name}-handed-on", **optimized(name)))
        expected = tmp_path / f"{name}-alone"
        runs = [tmp_path / name, tmp_path / f"{name}-handed-on"]
        tolerance = MUON if name == "muon" else 1e-5
        assert len(figures(runs[0])) == len(figures(expected)) >= 2 * STEPS
        assert figures(runs[0]) == pytest.approx(figures(expected), rel=tolerance)
        # Of a run that is handed on, each part has validated at its own end.
        assert figures(runs[1])[-3:] == pytest.approx(figures(expected)[-3:], rel=tolerance)
        kept, other = state(expected), state(tmp_path / f"{name}-handed-on")
        assert {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in other.items()}
