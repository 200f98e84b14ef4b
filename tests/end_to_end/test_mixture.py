"""Training on several datasets at once, by the command line's keys."""

import json
import shutil
from pathlib import Path

import pytest

import penstock
from penstock.checkpoint import list_checkpoints
from penstock.cli import main
from penstock.errors import UserError
from penstock.training.metrics import read_metrics


@pytest.fixture(scope="module")
def members(dataset_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three members: a dataset, one of other text, one in a format of others."""
    root = tmp_path_factory.mktemp("members")
    shutil.copytree(dataset_folder, root / "a")
    some = root / "some"
    some.mkdir()
    for file in sorted(corpus.iterdir())[:25]:
        shutil.copy(file, some)
    penstock.prepare(
        source={"path": str(some)},
        tokenizer={"from": str(dataset_folder)},
        data={"path": str(root / "b"), "sequence_length": 64},
    )
    words = [f"from={root / 'a'}", f"out={root / 'c'}", "data.format=tfrecord", "--quiet"]
    assert main(["convert", "dataset", *words, "data.sequence_length=64"]) == 0
    shutil.copy(dataset_folder / "tokenizer.json", root / "c")
    return root


def settings(executable: Path, members: Path, run: Path, mixture: str, **train: object) -> dict:
    return {
        "executable": str(executable),
        "data": {"mixture": mixture.format(members).strip("[]").split(",")},
        "run": str(run),
        "train": {"steps": 8, "tensorboard": False, "report": False, **train},
        "checkpoint": {"every": 4, "keep": 9},
    }


MIXTURE = "[0.5,{0}/a,0.25,{0}/b,0.25,{0}/c]"


@pytest.fixture(scope="module")
def run(tiny_executable: Path, members: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    penstock.train(**settings(tiny_executable, members, run, MIXTURE, evaluate_every=4))
    return run


def losses(run: Path) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in read_metrics(run / "metrics.jsonl") if "loss" in m}


def stop_at_step_4(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    for path in list_checkpoints(copy / "checkpoints")[1:]:
        shutil.rmtree(path)


def test_samples_are_counted_by_member_and_each_is_validated(run: Path) -> None:
    records = read_metrics(run / "metrics.jsonl")
    counted = [r for r in records if "samples/a" in r]
    for record in counted:
        drawn = 4 * record["step"]
        assert record["samples/a"] + record["samples/b"] + record["samples/c"] == drawn
        assert abs(record["samples/a"] - drawn / 2) < 1
        assert record["data_seconds"] >= 0
    validated = next(r for r in records if "validation_loss" in r)
    parts = [validated[f"validation_loss/{name}"] for name in "abc"]
    assert validated["validation_loss"] == pytest.approx(parts[0] / 2 + sum(parts[1:]) / 4)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"]["samples"] == {"a": 16, "b": 8, "c": 8}


def test_a_stopped_mixture_resumes_to_the_same_losses(
    run: Path, tiny_executable: Path, members: Path, tmp_path: Path
) -> None:
    stop_at_step_4(run, tmp_path / "run")
    penstock.train(**settings(tiny_executable, members, tmp_path / "run", MIXTURE))
    assert losses(tmp_path / "run") == losses(run)


def test_weights_may_change_on_resume(
    run: Path, tiny_executable: Path, members: Path, tmp_path: Path
) -> None:
    stop_at_step_4(run, tmp_path / "run")
    changed = "[0,{0}/a,1,{0}/b,0,{0}/c]"
    penstock.train(**settings(tiny_executable, members, tmp_path / "run", changed))
    drawn = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]["samples"]
    assert drawn == {"a": 8, "b": 4 + 16, "c": 4}
    assert {s: losses(run)[s] for s in (1, 4)} == {s: losses(tmp_path / "run")[s] for s in (1, 4)}


def test_plan_shows_the_mixture(members: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "model.preset=gpt2-tiny", f"data.mixture=[{members}/a,{members}/b]"]
    assert main(words) == 0
    shown = capsys.readouterr().err
    assert "mixture" in shown
    assert "%" in shown


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("[0.5,{0}/a,{0}/b]", "is no list of weights and datasets in turn"),
        ("[0,{0}/a,0,{0}/b]", "is no list of weights"),
        ("[{0}/a,0.5]", "0.5 stands where a dataset should"),
        ("[1,{0}/nothing]", "is not a dataset"),
        ("[]", "the mixture is empty"),
    ],
)
def test_mistakes_are_one_line(
    mixture: str, message: str, members: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "run=x", "train.steps=1", f"data.mixture={mixture.format(members)}"]
    assert main([*words, "model.preset=gpt2-tiny"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_members_of_several_tokenizers_are_refused(
    members: Path, corpus: Path, tmp_path: Path
) -> None:
    penstock.prepare(
        source={"path": str(corpus)},
        tokenizer={"train": True, "vocab_size": 300},
        data={"path": str(tmp_path / "other"), "sequence_length": 64},
    )
    with pytest.raises(UserError, match="another tokenizer"):
        penstock.plan(data={"mixture": [members / "a", tmp_path / "other"]})
    with pytest.raises(UserError, match="are all set"):
        penstock.plan(data={"path": members / "a", "mixture": [members / "a"]})
