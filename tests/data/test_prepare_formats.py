"""`prepare` in every format: the tokens and weights our own format would hold, and SambaNova's own."""

import hashlib
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

import penstock
from penstock.cli import main
from penstock.config.data import DataSection, TokenizerSection
from penstock.data.dataset import Dataset
from penstock.data.formats.recognize import recognize
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.data.members import open_any
from penstock.data.tokenizer import Tokenizer
from penstock.errors import ConfigError, DataError

LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["some words to learn from, told and asked " * 50], 300).save(
        folder / "tokenizer.json"
    )
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "in.jsonl"
    lines = [
        {"prompt": f"asked {i} words", "completion": "told " * (i % 9 + 1)} for i in range(120)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def prepare(records: Path, tokenizer: Path, out: Path, source: dict | None = None, **data: object):
    return penstock.prepare(
        source={"kind": "jsonl", "path": str(records), **(source or {})},
        tokenizer={"from": str(tokenizer)},
        data={"path": str(out), "sequence_length": LENGTH, "splits": [8, 1, 1], **data},
        prepare={"workers": 1},
    )


def stored(folder: Path, split: str) -> list[TokenSequence]:
    found = recognize(folder)
    return list(FORMATS[found.format].read(found.splits[split]).sequences())


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "kind", "packing"),
    [
        ("pretraining_txt", "text", "full"),
        ("generative_tuning", "jsonl", "single::drop"),
        ("dialogue", "jsonl", "single::truncate_right"),
    ],
)
def test_sambanovas_own_files_come_from_their_inputs(
    name: str, kind: str, packing: str, test_data: Path, tmp_path: Path
) -> None:
    folder = test_data / "sambanova-prep" / name
    (source,) = (p for p in folder.iterdir() if p.stem == "input")
    result = penstock.prepare(
        source={"kind": kind, "path": str(source)},
        tokenizer={"from": str(test_data / "gpt2-tokenizer")},
        data={
            "path": str(tmp_path / "d"),
            "sequence_length": 1024,
            "packing": packing,
            "format": "sambanova",
            "splits": [1, 0, 0],
        },
        prepare={"workers": 1, "shard_bytes": 20_000},
    )
    assert result.dataset.manifest["format"] == "sambanova"
    with (
        h5py.File(folder / "expected.hdf5") as a,
        h5py.File(tmp_path / "d" / "train_1_of_1.hdf5") as b,
    ):
        for key in ("input_ids", "token_type_ids"):
            np.testing.assert_array_equal(b[key][:], a[key][:])


@pytest.mark.parametrize("files", [1, 3])
def test_sambanovas_metadata_counts_what_was_read_kept_and_dropped(
    files: int, tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    lines = [{"prompt": "ask " * (i % 7), "completion": "told " * (i % 60)} for i in range(80)]
    lines.insert(9, {"prompt": "a prompt of words " * 20, "completion": "never seen"})
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    words = {"packing": "greedy::truncate_right", "format": "sambanova", "files": files}
    prepare(tmp_path / "in.jsonl", tokenizer_folder, out, splits=[1, 0, 0], **words)
    values = yaml.safe_load((out / "metadata.yaml").read_text())
    articles = []
    for line in lines:
        prompt = tokenizer.encode(line["prompt"].rstrip(" ")) if line["prompt"] else []
        told = tokenizer.encode(" " + line["completion"]) if line["completion"] else []
        articles += [(len(prompt), len(told) + 1)] if told else []
    read = sum(sum(article) for article in articles)
    beyond = sum(max(0, sum(article) - LENGTH) for article in articles)
    rows = values["train_sequences"]
    kept = values["train_prompt_tokens"] + values["train_completion_tokens"]
    # The one whose completion is beyond the row's end leaves a row of its prompt alone.
    assert values["train_tokens_dropped_from_all_prompt"] == LENGTH
    assert values["train_tokens_dropped_from_packing"] == beyond > LENGTH
    assert values["train_articles"] == len(articles)
    assert values["train_input_tokens"] == read == kept + beyond + LENGTH
    assert values["train_output_tokens"] == rows * LENGTH == kept + values["train_padding_tokens"]
    assert values["number_of_training_files"] == files
    assert values["max_batch_size_train"] == rows // files


def test_sambanovas_own_check_finds_every_file_as_it_should_be(
    records: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """As `validate_sha256` of its tool: each file by its folders and name, joined by underscores."""
    prepare(records, tokenizer_folder, tmp_path / "a", format="sambanova")
    sections = {"from": str(tmp_path / "a"), "data": {"format": "sambanova"}}
    penstock.convert("dataset", **sections, out=str(tmp_path / "b"))
    for folder in (tmp_path / "a", tmp_path / "b"):
        known = json.loads((folder / "sha256" / "files_metadata.json").read_text())
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = {"_".join(path.relative_to(folder).parts): path for path in files}
        assert names.pop("sha256_files_metadata.json")
        assert known.keys() == names.keys()
        assert "tokenizer_tokenizer.json" in names
        for name, path in names.items():
            assert known[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert known[name]["size"] == path.stat().st_size
            assert known[name]["modified_time"] == pytest.approx(path.stat().st_mtime)
    # Rows without what they were packed from: articles by their separators, the rest unknown.
    made = yaml.safe_load((tmp_path / "a" / "metadata.yaml").read_text())
    converted = yaml.safe_load((tmp_path / "b" / "metadata.yaml").read_text())
    unknown = ("_input_tokens", "_from_packing", "_from_all_prompt")
    assert {k: v for k, v in made.items() if not k.endswith(unknown)} == {
        k: v for k, v in converted.items() if not k.endswith(unknown)
    }
    assert converted["train_input_tokens"] is None


@pytest.mark.parametrize("packing", ["full", "greedy::drop", "single::truncate_right"])
@pytest.mark.parametrize(
    "format", ["sambanova", "cerebras", "tfrecord", "parquet", "arrow", "jsonl"]
)
def test_every_format_holds_all_tokens_and_weights(
    format: str, packing: str, records: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    ours = prepare(records, tokenizer_folder, tmp_path / "ours", packing="full").dataset
    theirs = prepare(
        records, tokenizer_folder, tmp_path / "theirs", packing=packing, format=format
    ).dataset
    for name in ("train", "validation", "test"):
        split = ours.split(name)
        rows = stored(tmp_path / "theirs", name)
        extra = FORMATS[format].extra
        assert max(len(row.tokens) for row in rows) <= LENGTH + extra
        skip = extra if packing == "full" else 0
        parts = [row.tokens[skip if i else 0 :] for i, row in enumerate(rows)]
        weights = [row.loss_weights()[skip if i else 0 :] for i, row in enumerate(rows)]
        if packing != "full" and extra:
            continue  # Cerebras' rows of several sequences have targets, no first weights
        assert np.concatenate(parts).tolist() == split.tokens.tolist()
        assert split.weights is not None
        # A first token is a target only in a stream.
        np.testing.assert_array_equal(np.concatenate(weights)[1:], np.asarray(split.weights)[1:])
    assert theirs.manifest["splits"]["train"]["documents"] == split_documents(ours, "train")


def split_documents(dataset: Dataset, name: str) -> int:
    return dataset.manifest["splits"][name]["documents"]


@pytest.mark.parametrize("format", ["pickle", "npy", "llmc", "nanogpt"])
def test_streams_hold_all_tokens(
    format: str, records: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    ours = prepare(records, tokenizer_folder, tmp_path / "ours").dataset
    prepare(records, tokenizer_folder, tmp_path / "theirs", format=format)
    rows = stored(tmp_path / "theirs", "train")
    assert np.concatenate([r.tokens for r in rows]).tolist() == ours.split("train").tokens.tolist()


@pytest.mark.parametrize("format", ["sambanova", "cerebras", "tfrecord", "parquet", "arrow"])
def test_several_files_hold_what_one_does(
    format: str, records: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    for files in (1, 3):
        prepare(
            records,
            tokenizer_folder,
            tmp_path / str(files),
            format=format,
            files=files,
            packing="single::drop",
        )
    one, three = stored(tmp_path / "1", "train"), stored(tmp_path / "3", "train")
    assert [r.tokens.tolist() for r in one] == [r.tokens.tolist() for r in three]
    assert len(recognize(tmp_path / "3").splits["train"]) == 3
    with pytest.raises(ConfigError, match="one file for each split.*sambanova, cerebras"):
        prepare(records, tokenizer_folder, tmp_path / "x", format="npy", files=2)


@pytest.mark.parametrize("format", ["sambanova", "cerebras", "tfrecord", "parquet", "jsonl"])
def test_what_prepare_writes_opens_for_training(
    format: str, records: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    arguments = {"packing": "single::truncate_right", "format": format}
    prepare(records, tokenizer_folder, tmp_path / "d", **arguments)
    assert prepare(records, tokenizer_folder, tmp_path / "d", **arguments).reused
    data = DataSection(path=str(tmp_path / "d"), sequence_length=LENGTH)
    opened = open_any(tmp_path / "d", data, TokenizerSection()).split("train")
    ours = prepare(
        records, tokenizer_folder, tmp_path / "o", packing="single::truncate_right"
    ).dataset.split("train")
    assert opened.samples(LENGTH) == ours.samples(LENGTH)
    for index in range(0, ours.samples(LENGTH), 7):
        for mine, other in zip(
            ours.sample(index, LENGTH), opened.sample(index, LENGTH), strict=True
        ):
            np.testing.assert_array_equal(mine[: LENGTH - 1], other[: LENGTH - 1])


def test_prompts_weigh_what_is_set_and_padding_nothing(
    records: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = {"prompt_weight": 0.25}
    dataset = prepare(
        records, tokenizer_folder, tmp_path / "d", source, packing="single::drop"
    ).dataset
    split = dataset.split("train")
    _, targets, weights = split.sample(0, LENGTH)
    length = int(split.reader.lengths[0])
    assert set(weights[: length - 1].tolist()) == {0.25, 1.0}
    assert not weights[length - 1 :].any()
    text = dataset.tokenizer().decode(targets[: length - 1][weights[: length - 1] == 1].tolist())
    assert text.startswith(" told")


def test_pairs_may_be_packed_apart(tokenizer_folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "asked", "completion": "told words"}] * 3
    (tmp_path / "in.jsonl").write_text("\n".join([json.dumps(pairs)] * 40))
    counts = {}
    for boundary in ("document", "pair"):
        dataset = prepare(
            tmp_path / "in.jsonl",
            tokenizer_folder,
            tmp_path / boundary,
            {"packing_boundary": boundary},
            packing="single::truncate_right",
            splits=[1, 0, 0],
        ).dataset
        counts[boundary] = len(dataset.split("train").reader.lengths)
        assert split_documents(dataset, "train") == 40
    assert counts == {"document": 40, "pair": 120}


def test_shuffling_keeps_every_document_and_depends_on_the_seed(
    records: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    made = {}
    for name, seed, shuffle in (("a", 1, True), ("b", 1, True), ("c", 2, True), ("d", 1, False)):
        dataset = penstock.prepare(
            source={"kind": "jsonl", "path": str(records)},
            tokenizer={"from": str(tokenizer_folder)},
            data={"path": str(tmp_path / name), "splits": [1, 0, 0], "shuffle": shuffle},
            prepare={"workers": 1, "shard_bytes": 1024},
            seed=seed,
        ).dataset
        reader = dataset.split("train").reader
        made[name] = [
            tuple(reader.tokens[s : s + n].tolist())
            for s, n in zip(reader.starts, reader.lengths, strict=True)
        ]
    assert made["a"] == made["b"] != made["c"]
    assert sorted(made["a"]) == sorted(made["c"]) == sorted(made["d"])


def test_what_went_wrong_is_in_the_manifest(tokenizer_folder: Path, tmp_path: Path) -> None:
    lines = ['{"text": "good words"}', "{bad", '{"text": "half \\ud800"}'] * 30
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    dataset = prepare(
        tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "d", {"on_error": "replace"}
    ).dataset
    assert dataset.manifest["left_out"] == {"broken records left out": 30}
    counts = [split_documents(dataset, name) for name in ("train", "validation", "test")]
    assert sum(counts) == 60


def test_a_former_dataset_in_the_folder_leaves_nothing(
    records: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    prepare(records, tokenizer_folder, tmp_path / "d")
    prepare(records, tokenizer_folder, tmp_path / "d", format="sambanova")
    assert recognize(tmp_path / "d").format == "sambanova"
    prepare(records, tokenizer_folder, tmp_path / "d")
    assert Dataset.open(tmp_path / "d")
    assert not list((tmp_path / "d").glob("*.hdf5"))


def test_mistakes_are_one_line(records: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="packing full for sambanova needs a length"):
        prepare(records, tokenizer_folder, tmp_path, format="sambanova", sequence_length=None)
    with pytest.raises(DataError, match="the train split has 0 of 0 tokens"):
        prepare(
            records,
            tokenizer_folder,
            tmp_path,
            format="jsonl",
            packing="single::drop",
            sequence_length=2,
        )


@pytest.mark.parametrize("packing", ["full", "greedy::truncate_right", "single::truncate_left"])
def test_categories_follow_their_tokens(
    packing: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Each pair's tokens carry its category, padding and what has none -1, in every packing."""
    records: list = [
        [
            {"prompt": f"ask {i}", "completion": f"tell {i} " * (i % 5 + 1), "category_id": i},
            {"prompt": "more", "completion": f"again {i}", "category_id": i + 1000},
            {"completion": "nothing"},
        ]
        for i in range(60)
    ]
    records += [{"text": f"a text of words {i}", "category_id": 7} for i in range(5)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = {"kind": "jsonl", "path": str(tmp_path / "in.jsonl"), "category_key": "category_id"}
    made = []
    for workers, shard_bytes in ((1, 1 << 20), (2, 2000)):
        out = tmp_path / str(workers)
        penstock.prepare(
            source=words,
            tokenizer={"from": str(tokenizer_folder)},
            data={"path": str(out), "format": "sambanova", "sequence_length": 96,
                  "packing": packing, "splits": [1, 0, 0]},
            prepare={"workers": workers, "shard_bytes": shard_bytes},
        )  # fmt: skip
        with h5py.File(out / "train_1_of_1.hdf5") as file:
            made.append({name: file[name][:] for name in file})
    ours, again = made
    assert sorted(ours) == ["category_ids", "input_ids", "token_type_ids"]
    for name in ours:
        np.testing.assert_array_equal(ours[name], again[name])
    assert ours["category_ids"].dtype == np.int32
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert (ours["category_ids"][ours["token_type_ids"] == 2] == -1).all()
    for category, text in ((3, "tell 3"), (1012, "again 12"), (7, "a text of words 4")):
        tokens = ours["input_ids"][ours["category_ids"] == category]
        assert text in tokenizer.decode(tokens.tolist())
        assert "nothing" not in tokenizer.decode(tokens.tolist())
    real = ours["token_type_ids"] != 2
    assert "nothing" in tokenizer.decode(
        ours["input_ids"][real & (ours["category_ids"] < 0)].tolist()
    )


def test_categories_are_read_kept_and_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut, read back, kept where the target holds them, and named as lost where not."""
    numbers = [np.array(row, np.int32) for row in ([7, 7, -1, 8], [9], [5, 5, 5, 5, 6, 6])]
    rows = [TokenSequence(np.arange(1, 1 + len(n)), categories=n) for n in numbers]
    layout = Layout(width=6, sequences=3, categories=True)
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        writer = FORMATS["sambanova"].write(tmp_path / name, "train", layout)
        for row in part:
            writer.append(row)
        writer.finish()
    plain = FORMATS["sambanova"].write(tmp_path / "b", "validation", Layout(width=6))
    plain.append(TokenSequence(np.array([3, 3])))
    plain.finish()
    file = tmp_path / "a" / "train_1_of_1.hdf5"
    found = list(FORMATS["sambanova"].read([file]).sequences())
    assert [row.categories.tolist() for row in found] == [[7, 7, -1, 8], [9]]
    splits = penstock.inspect(str(tmp_path / "a")).json()["splits"]
    assert splits["train"]["categories"] == {7: 2, -1: 1, 8: 1, 9: 1}
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert re.search(r"categories +3\s", capsys.readouterr().err)

    sections = {"from": str(tmp_path / "b"), "data": {"format": "sambanova", "sequence_length": 4}}
    kept = penstock.convert("dataset", **sections, out=str(tmp_path / "c"))
    assert not any("categories" in what for what in kept.lost)
    with h5py.File(tmp_path / "c" / "train_1_of_1.hdf5") as made:
        assert made["category_ids"][:].tolist() == [[5, 5, 5, 5], [6, 6, -1, -1]]
    with h5py.File(tmp_path / "c" / "dev_1_of_1.hdf5") as made:
        assert made["category_ids"][:].tolist() == [[-1, -1, -1, -1]]

    sections = {"from": str(tmp_path / "a"), "data": {"format": "jsonl"}}
    lost = penstock.convert("dataset", **sections, out=str(tmp_path / "d"))
    assert "categories of tokens" in lost.lost
    assert "cannot hold categories of tokens: this is lost" in " ".join(
        "".join(capsys.readouterr()).split()
    )


def test_categories_of_another_shape_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "train_1_of_1.hdf5", "w") as file:
        for name, width in (("input_ids", 4), ("token_type_ids", 4), ("category_ids", 5)):
            file[name] = np.ones((2, width), np.int32)
    with pytest.raises(DataError, match=r"input_ids \(2, 4\) but category_ids \(2, 5\)"):
        FORMATS["sambanova"].read([tmp_path / "train_1_of_1.hdf5"])


def test_categories_need_their_format_and_are_numbers(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    lines = [{"text": f"words {i}", "category_id": "news"} for i in range(30)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = {"kind": "jsonl", "path": str(tmp_path / "x.jsonl"), "category_key": "category_id"}
    common = {"tokenizer": {"from": str(tokenizer_folder)}}
    with pytest.raises(ConfigError, match=r"megatron holds no categories.*source\.category_key"):
        penstock.prepare(source=words, data={"path": str(tmp_path / "d")}, **common)
    data = {"path": str(tmp_path / "d"), "format": "sambanova", "sequence_length": 8}
    with pytest.raises(DataError, match="category_id that is no number of a category.*line 1"):
        penstock.prepare(source=words, data=data, **common)
    named = {**words, "categories": ["sports", "weather"]}
    with pytest.raises(DataError, match=r"none of source\.categories: 'news'.*line 1"):
        penstock.prepare(source=named, data=data, **common)
    with pytest.raises(ConfigError, match=r"no field that has them.*source\.categories"):
        penstock.prepare(source={**named, "category_key": None}, data=data, **common)
    penstock.prepare(source={**named, "categories": ["sports", "news"]}, data=data, **common)
    with h5py.File(tmp_path / "d" / "train_1_of_1.hdf5") as file:
        numbers, roles = file["category_ids"][:], file["token_type_ids"][:]
    assert set(numbers[roles != 2].tolist()) == {1}
    names = json.loads((tmp_path / "d" / "category_to_id.json").read_text())
    assert names == {"sports": 0, "news": 1}
    checked = json.loads((tmp_path / "d" / "sha256" / "files_metadata.json").read_text())
    assert "category_to_id.json" in checked
