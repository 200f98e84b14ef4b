"""Scoring from an executable for evaluation, against scoring without kernels."""

import json
from pathlib import Path

import pytest

import penstock
from penstock.cli import main


@pytest.fixture(scope="module")
def run(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model after three steps without kernels."""
    folder = tmp_path_factory.mktemp("run")
    penstock.train(
        model={"preset": "gpt2-tiny"},
        data={"path": str(dataset_folder)},
        batch={"micro": 2, "size": 2},
        compile={"mode": "off"},
        precision={"compute": "fp32"},
        train={"steps": 3, "evaluate_sequences": 2, "report": False},
        run=str(folder),
    )
    return folder


@pytest.fixture(scope="module")
def executable(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of such a model, two sequences at a time."""
    path = tmp_path_factory.mktemp("executable") / "score.penstock"
    penstock.compile(
        mode="evaluate",
        model={"preset": "gpt2-tiny"},
        data={"path": str(dataset_folder)},
        batch={"micro": 2},
        precision={"compute": "fp32"},
        executable=str(path),
    )
    return path


def test_scores_are_those_without_kernels(
    run: Path, executable: Path, dataset_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scored(*more: str) -> dict[str, float]:
        words = ["evaluate", f"run={run}", f"data.path={dataset_folder}", *more]
        assert main([*words, "evaluate.split=test", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    without, through = scored("compile.mode=off"), scored(f"executable={executable}")
    assert through["tokens"] == without["tokens"] > 100
    assert through["loss"] == pytest.approx(without["loss"], rel=1e-6)


def test_there_is_no_training_from_it(
    executable: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.path={dataset_folder}", f"run={tmp_path}/run", "train.steps=1"]
    assert main(["train", f"executable={executable}", *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert "mode=evaluate" in told[0]
