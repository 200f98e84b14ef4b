"""`penstock profile` from end to end: real steps, the tables, the page, the trace, mistakes."""

import gzip
import json
import re
from pathlib import Path

import pytest

from penstock.cli import main
from tests.test_cli import fails


def profiled(out: Path, *words: str) -> dict:
    assert main(["profile", *words, f"out={out}", "--quiet"]) == 0
    return json.loads((out / "profile.json").read_text())


def shares(value: dict) -> dict[str, float]:
    return {row["name"]: row["share"] for row in value["regions"]}


def test_training_from_an_executable(
    tiny_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    words = [f"executable={tiny_executable}", f"data.path={dataset_folder}", "profile.steps=2"]
    value = profiled(tmp_path, *words)
    assert value["steps"] == 2
    found = shares(value)
    assert set(found) >= {
        *("block forward", "block backward", "head, forward and backward", "optimizer"),
        *("embedding forward", "embedding backward", "gradient norm", "data", "everything else"),
    }
    assert sum(found.values()) == pytest.approx(1)
    total = sum(row["seconds"] for row in value["regions"])
    assert total == pytest.approx(value["step_seconds"])
    kernels = {row["name"]: row for row in value["operations"] if "machine" in row["operation"]}
    assert set(kernels) >= {"block_forward", "block_backward", "head_train"}
    assert kernels["block_forward"]["calls"] == 2, "two layers"
    assert any("cannot be split further" in note for note in value["notes"])
    block = next(row for row in value["regions"] if row["name"] == "block forward")
    flops = 1e9 * block["gflops_per_second"]
    assert 0 < block["least_seconds"] <= block["seconds"]
    assert block["peak_share"] == pytest.approx(flops / value["peak_flops"])
    assert value["environment"]["cores"] >= 1
    page = (tmp_path / "profile.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=\"http|url\(http|@import", page), "it stands alone"
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = {e.get("name") for e in trace["traceEvents"]}
    assert {"phase/step", "region/block forward", "kernel/block_backward"} <= names


def test_training_without_kernels_names_operations(dataset_folder: Path, tmp_path: Path) -> None:
    words = ["model.preset=gpt2-tiny", "compile.mode=off", f"data.path={dataset_folder}"]
    value = profiled(tmp_path, *words, "profile.steps=2", "plan.recompute=blocks")
    found = shares(value)
    assert found["block backward"] > found["everything else"]
    assert sum(found.values()) == pytest.approx(1)
    operations = {(row["name"], row["operation"]) for row in value["operations"]}
    assert ("block backward", "aten::mm") in operations
    assert not any("cannot be split" in note for note in value["notes"])


def test_generation(trained_run: Path, tmp_path: Path) -> None:
    words = ["mode=generate", f"run={trained_run}", "generate.prompt=def f(x):", "profile.steps=4"]
    found = shares(profiled(tmp_path, *words))
    assert {"block prefill", "block decode", "head", "embedding"} <= set(found)
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.preset=gpt2-tiny"], "set out=FOLDER"),
        (["model.preset=gpt2-tiny", "out=OUT"], "no dataset"),
        (["model.preset=gpt2-tiny", "out=OUT", "data.path=/nowhere"], "is not a dataset"),
        (["mode=evaluate", "out=OUT"], "does not record mode=evaluate"),
        (["mode=generate", "out=OUT"], "there is no prompt"),
        (["mode=generate", "out=OUT", "run=/nowhere", "generate.prompt=x"], "is not a run"),
        (["profile.steps=0", "out=OUT"], "profile.steps=0 is wrong"),
        (["profile.step=3", "out=OUT"], "did you mean profile.steps?"),
        (["executable=/nowhere.penstock", "out=OUT", "data.path=x"], "does not exist"),
    ],
)
def test_a_job_that_fails_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    assert message in fails(capsys, "profile", *given)
    assert not (tmp_path / "out").exists()
