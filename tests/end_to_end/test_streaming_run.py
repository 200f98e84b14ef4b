"""Training straight from raw text, killed at any moment and gone on with."""

import json
from pathlib import Path

import pytest

import penstock
from penstock.cli import main
from penstock.training.metrics import read_metrics
from tests.end_to_end.test_resume import assert_same_run, kill_and_resume


def job(executable: Path, corpus: Path, tokenizer: Path, run: Path, **more: object) -> dict:
    return {
        "executable": str(executable),
        "source": {"path": str(corpus), "documents": "blank_line"},
        "tokenizer": {"from": str(tokenizer)},
        "data": {"streaming": True, "shuffle_buffer": 32, "lanes": 2},
        "run": str(run),
        "optimizer": {"lr": 3e-3},
        "train": {
            "steps": 12,
            "tensorboard": False,
            "report": False,
            "evaluate_every": 4,
            "evaluate_sequences": 8,
        },
        "checkpoint": {"every": 2, "keep": 3},
        **more,
    }


def test_a_killed_stream_ends_with_the_same_bits(
    dropout_executable: Path, corpus: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    whole = job(dropout_executable, corpus, dataset_folder, tmp_path / "whole")
    penstock.train(**whole)
    parts = job(dropout_executable, corpus, dataset_folder, tmp_path / "parts")
    kill_and_resume(parts, [0.02, 0.05])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert records[-1]["validation_loss"] < records[0]["loss"]
    assert all(r["data_seconds"] >= 0 for r in records if "loss" in r)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert 0 <= summary["data"]["waiting"] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.epochs=1"], "a stream of text has no epochs"),
        (["train.steps=1", "train.evaluate_sequences=null"], "no known end"),
        (["train.steps=1", "data.path=x"], "data.path and data.streaming are all set"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    corpus: Path,
    dataset_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = [f"source.path={corpus}", f"tokenizer.from={dataset_folder}", f"run={tmp_path / 'r'}"]
    common += ["data.streaming=true", "model.preset=gpt2-tiny", "data.sequence_length=64"]
    assert main(["train", *common, "compile.mode=off", *words]) == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
