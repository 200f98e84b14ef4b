"""Data sets in the hub's layout, from local folders: no network is needed, and no code is run."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import penstock
from penstock.config.data import SourceSection
from penstock.data.sources import SOURCES, read_documents
from penstock.errors import DataError

pytestmark = pytest.mark.skipif(
    find_spec("datasets") is None, reason="the extra `hub` is not installed"
)

ROWS = [{"text": f"document {i} " * 5} for i in range(60)]


def read(**keys: object) -> dict[str | None, list[str]]:
    section = SourceSection(kind="hub", **keys)
    found: dict[str | None, list[str]] = {}
    for file in SOURCES["hub"].files(section):
        texts = [piece.text for piece in read_documents(file, section)]
        found.setdefault(file.split, []).extend(texts)
    return found


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def test_a_folder_in_the_hubs_layout_is_read_by_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "train-00000.jsonl", ROWS[:30])
    jsonl(tmp_path / "train-00001.jsonl", ROWS[30:50])
    jsonl(tmp_path / "validation.jsonl", ROWS[50:])
    texts = [row["text"] for row in ROWS]
    assert read(path=str(tmp_path)) == {"train": texts[:50], "validation": texts[50:]}


def test_configurations_are_told_apart(tmp_path: Path) -> None:
    for name, rows in (("one", ROWS[:20]), ("two", ROWS[20:])):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "train.jsonl", rows)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*.jsonl\n"
        "- config_name: two\n  data_files: two/*.jsonl\n---\n"
    )
    assert read(path=str(tmp_path), name="two") == {None: [row["text"] for row in ROWS[20:]]}
    with pytest.raises(DataError, match=r"cannot be read.*source\.name"):
        read(path=str(tmp_path))


def test_saved_folders_and_parquet_are_read(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "train.parquet")
    expected = {None: [row["text"] for row in ROWS]}
    assert read(path=str(tmp_path / "saved")) == expected
    assert read(path=str(tmp_path / "parquet")) == expected
    section = SourceSection(kind="hub", path=str(tmp_path / "saved"))
    assert len(SOURCES["hub"].files(section)) == 3


def test_prepare_keeps_the_splits_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in" / "train.jsonl", ROWS[:50])
    jsonl(tmp_path / "in" / "test.jsonl", ROWS[50:])
    dataset = penstock.prepare(
        source={"kind": "hub", "path": str(tmp_path / "in")},
        tokenizer={"train": True, "vocab_size": 300},
        data={"path": str(tmp_path / "d")},
        prepare={"workers": 1},
    ).dataset
    counts = {name: facts["documents"] for name, facts in dataset.manifest["splits"].items()}
    assert counts == {"train": 50, "validation": 0, "test": 10}


def test_a_data_sets_own_code_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(DataError, match="cannot be read"):
        read(path=str(folder))
    assert not marker.exists()


def cached(folder: Path, name: str, configurations: dict[str, list[dict]]) -> None:
    """A cache as `datasets` leaves it after a download, each configuration with a train split."""
    import datasets

    owner, _, short = name.partition("/")
    for configuration, rows in configurations.items():
        made = folder / "made" / configuration
        jsonl(folder / f"{configuration}.jsonl", rows)
        datasets.load_dataset(
            "json",
            configuration,
            data_files={"train": str(folder / f"{configuration}.jsonl")},
            cache_dir=str(made),
        )
        (table,) = made.rglob("*.arrow")
        target = folder / "cache" / f"{owner}___{short}" / configuration / "0.0.0" / ("0" * 40)
        target.mkdir(parents=True)
        table.replace(target / f"{short}-train.arrow")
        info = json.loads((table.parent / "dataset_info.json").read_text())
        info |= {"config_name": configuration, "dataset_name": short}
        info["splits"]["train"]["dataset_name"] = short
        (target / "dataset_info.json").write_text(json.dumps(info))


def test_a_data_set_of_the_hub_is_found_by_its_name(tmp_path: Path) -> None:
    """Without a network, from the cache: by name and configuration."""
    cached(tmp_path, "someone/things", {"one": ROWS[:20], "two": ROWS[20:]})
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "home"),
    }
    words = ["source.kind=hub", "source.path=someone/things", "data.splits=[1,0,0]"]
    words += ["tokenizer.train=true", "tokenizer.vocab_size=300", "prepare.workers=1"]

    def prepare(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "penstock", "prepare", *words, *more],
            capture_output=True,
            check=False,
            text=True,
            env=environment,
        )

    done = prepare("source.name=two", f"data.path={tmp_path / 'd'}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["documents"] == 40
    for more, told in (([], "one"), (["source.name=three"], "three")):
        refused = prepare(*more, f"data.path={tmp_path / 'e'}")
        assert refused.returncode == 2, refused.stderr
        assert "someone/things cannot be read" in " ".join(refused.stderr.split())
        assert told in refused.stderr
        assert "Traceback" not in refused.stderr
