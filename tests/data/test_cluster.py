"""Preparation on a Ray cluster: the bytes of preparation here, also after the driver is killed."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.data.dataset import MANIFEST

CHILD = "import sys, json, penstock; penstock.prepare(**json.loads(sys.argv[1]))"


def settings(corpus: Path, dataset: Path, out: Path, engine: str) -> dict:
    return {
        "source": {"path": str(corpus)},
        "tokenizer": {"from": str(dataset)},
        "data": {"path": str(out), "sequence_length": 64},
        "prepare": {"engine": engine, "workers": 2, "shard_bytes": 20_000},
    }


def shards_done(out: Path) -> int:
    return len(list(out.glob(".prepare/*/shard-*/facts.json")))


@pytest.mark.slow
def test_a_killed_cluster_goes_on_to_the_bytes_made_here(
    corpus: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'penstock[ray]'")
    import penstock

    penstock.prepare(**settings(corpus, dataset_folder, tmp_path / "here", "local"))
    out = tmp_path / "cluster"
    arguments = json.dumps(settings(corpus, dataset_folder, out, "ray"))
    process = subprocess.Popen([sys.executable, "-c", CHILD, arguments])
    while process.poll() is None and not shards_done(out):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < shards_done(out)
    penstock.prepare(**settings(corpus, dataset_folder, out, "ray"))
    names = json.loads((tmp_path / "here" / MANIFEST).read_text())["files"]
    for name in [*names, MANIFEST]:
        assert (out / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


def test_without_ray_one_line_says_what_to_install(
    corpus: Path,
    dataset_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [f"source.path={corpus}", f"tokenizer.from={dataset_folder}", "prepare.engine=ray"]
    assert main(["prepare", *words, f"data.path={tmp_path / 'd'}"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "Ray is not installed (prepare.engine=ray): pip install 'penstock[ray]'" in err
