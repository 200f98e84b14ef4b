"""Preparing datasets: sources, splits, packing, determinism, reuse, resumption."""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

import penstock
from penstock.config.data import SourceSection
from penstock.data import prepare as prepare_module
from penstock.data.dataset import Dataset
from penstock.data.sources import read_documents
from penstock.data.sources.files import list_files
from penstock.data.splits import choose_split
from penstock.data.tokenizer import Tokenizer
from penstock.errors import ConfigError, DataError, UserError


def prepare(source: dict, path: Path, **data: object) -> Dataset:
    result = penstock.prepare(
        source=source,
        tokenizer={"train": True, "vocab_size": 300},
        data={"path": str(path), "sequence_length": 16, **data},
        prepare={"workers": 1},
    )
    return result.dataset


def text_of(dataset: Dataset, split: str) -> str:
    tokenizer = dataset.tokenizer()
    return tokenizer.decode(dataset.split(split).tokens.tolist()).replace("<|endoftext|>", "")


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_every_byte_of_the_text_is_in_the_dataset(dataset_folder: Path, corpus: Path) -> None:
    dataset = Dataset.open(dataset_folder)
    texts = "".join(text_of(dataset, name) for name in dataset.manifest["splits"])
    originals = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    assert sorted(texts) == sorted("".join(originals))
    for name, facts in dataset.manifest["splits"].items():
        assert facts["text_bytes"] == len(text_of(dataset, name).encode())
        assert facts["words"] == sum(
            len(text.split()) for text in originals if text in text_of(dataset, name)
        )


def test_workers_shards_and_interruptions_leave_no_trace(
    dataset_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "source": {"path": str(corpus)},
        "tokenizer": {"train": True, "vocab_size": 512},
        "data": {"path": str(tmp_path / "d"), "sequence_length": 64},
        "prepare": {"workers": 2, "shard_bytes": 60_000},
    }

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_dataset", stop)
        with pytest.raises(KeyboardInterrupt):
            penstock.prepare(**arguments)
    assert list((tmp_path / "d" / ".prepare").rglob("facts.json"))
    penstock.prepare(**arguments)
    assert not (tmp_path / "d" / ".prepare").exists()
    assert files_of(tmp_path / "d") == files_of(dataset_folder)


@pytest.mark.parametrize("packing", ["full", "greedy::truncate_right", "single::drop"])
@pytest.mark.parametrize("documents", ["file", "line", "blank_line"])
def test_large_files_are_shared_out_without_a_trace(
    documents: str, packing: str, tmp_path: Path
) -> None:
    generator = np.random.default_rng(7)
    words = ["flow", "pipe ", "turbine,", "naïve", " 漢字", "\r\n", "\n\n", "\t"]
    text = " ".join(generator.choice(words, 6000))
    (tmp_path / "long.txt").write_text(text, newline="")
    folders = [tmp_path / str(size) for size in (2048, 1 << 20)]
    for folder, shard_bytes in zip(folders, (2048, 1 << 20), strict=True):
        penstock.prepare(
            source={"path": str(tmp_path / "long.txt"), "documents": documents},
            tokenizer={"train": True, "vocab_size": 300},
            data={"path": str(folder), "sequence_length": 16, "packing": packing},
            prepare={"workers": 1, "shard_bytes": shard_bytes},
        )
    assert files_of(folders[0]) == files_of(folders[1])


def test_an_interruption_and_other_shards_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(30):
        (texts / f"{index}.txt").write_text(f"the text of file {index}\n" * 60)
    arguments = {
        "source": {"path": str(texts)},
        "tokenizer": {"train": True, "vocab_size": 300},
        "data": {"path": str(tmp_path / "d"), "sequence_length": 16},
    }
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_dataset", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            penstock.prepare(**arguments, prepare={"workers": 1, "shard_bytes": 1500})
    dataset = penstock.prepare(**arguments, prepare={"workers": 1, "shard_bytes": 5000}).dataset
    found = "".join(text_of(dataset, name) for name in dataset.manifest["splits"])
    assert sorted(found) == sorted("".join(path.read_text() for path in texts.iterdir()))


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.txt").write_text(name)
    section = SourceSection(path=[str(tmp_path / "one"), str(tmp_path / "two")])
    assert [file.id for file in list_files(section)] == ["one/same.txt", "two/same.txt"]
    twice = SourceSection(path=[str(tmp_path / "one"), str(tmp_path / "one" / "*.txt")])
    assert len(list_files(twice)) == 1


@pytest.mark.parametrize("count", [20, 40, 79, 300])
def test_no_split_stays_empty(count: int, tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for index in range(count):
        (source / f"{index}.txt").write_text(f"the text of file {index}\n" * 20)
    dataset = prepare({"path": str(source)}, tmp_path / "d")
    tokens = [dataset.split(name).token_count for name in ("train", "validation", "test")]
    assert min(tokens) > 0
    assert 0.7 < tokens[0] / sum(tokens) < 0.98


def test_counts_are_of_the_text_that_packing_keeps(tmp_path: Path) -> None:
    lines = ["short one", "a line that is far longer than any row " * 9, "naïve 漢字"] * 100
    (tmp_path / "x.txt").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "x.txt"), "documents": "line"}
    dropped = prepare(source, tmp_path / "d", packing="greedy::drop", splits=[1, 0, 0])
    facts = dropped.manifest["splits"]["train"]
    kept = [line for line in lines if len(line) < 100]
    assert facts["documents"] == len(kept)
    assert facts["text_bytes"] == sum(len(line.encode()) for line in kept)
    assert facts["words"] == sum(len(line.split()) for line in kept)


def test_a_script_without_a_guard_can_prepare(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text("some words of text\n" * 100)
    script = tmp_path / "script.py"
    script.write_text(
        "import penstock\n"
        f"penstock.prepare(source={{'path': {str(tmp_path / '*.txt')!r}}},"
        "tokenizer={'train': True, 'vocab_size': 300},"
        f"data={{'path': {str(tmp_path / 'd')!r}, 'sequence_length': 16}},"
        "prepare={'workers': 2, 'shard_bytes': 1024})\n"
        "print('prepared once')\n"
    )
    run = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("prepared once") == 1


def test_unchanged_input_is_reused_and_changed_input_is_not(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    arguments = {
        "source": {"path": str(text)},
        "tokenizer": {"train": True, "vocab_size": 300},
        "data": {"path": str(tmp_path / "d"), "sequence_length": 16},
    }
    assert not penstock.prepare(**arguments).reused
    assert penstock.prepare(**arguments).reused
    text.write_text("another text altogether\n" * 200)
    assert not penstock.prepare(**arguments).reused


def test_a_single_file_is_cut_at_line_ends_into_contiguous_parts(tmp_path: Path) -> None:
    lines = [f"line {i} of the only file\n" for i in range(400)]
    (tmp_path / "one.txt").write_text("".join(lines))
    dataset = prepare({"path": str(tmp_path / "one.txt")}, tmp_path / "d")
    parts = [text_of(dataset, name) for name in ("train", "validation", "test")]
    assert "".join(parts) == "".join(lines)
    assert all(part.endswith("\n") and part.startswith("line") for part in parts)
    assert 0.85 < len(parts[0]) / len("".join(lines)) < 0.95


def test_compressed_files_give_the_text_of_plain_ones(tmp_path: Path) -> None:
    text = "".join(f"some words, number {i}\n" for i in range(300)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.zst").write_bytes(zstandard.compress(text))
    for name in ("a.txt", "b.txt.gz", "c.zst"):
        section = SourceSection(path=str(tmp_path / name))
        pieces = read_documents(list_files(section)[0], section)
        assert "".join(piece.text for piece in pieces).encode() == text


@pytest.mark.parametrize(("documents", "count"), [("file", 1), ("line", 4), ("blank_line", 2)])
def test_document_separators(documents: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\n\n  \nthree\nfour")
    section = SourceSection(path=str(tmp_path / "x.txt"), documents=documents)
    pieces = list(read_documents(list_files(section)[0], section))
    assert sum(piece.ends for piece in pieces) == count
    assert len({piece.document for piece in pieces}) == count


def test_globs_and_lists_name_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    section = SourceSection(path=[str(tmp_path / "*.txt"), str(tmp_path / "c.md")])
    assert len(list_files(section)) == 3


def test_cutting_a_long_document_does_not_change_its_tokens(corpus: Path) -> None:
    text = "".join(path.read_text() for path in sorted(corpus.iterdir()))
    tokenizer = Tokenizer.train([text], 512)
    section = SourceSection(path=str(corpus))
    for file in list_files(section)[:10]:
        whole = Path(file.path).read_text()
        cut = [i for i in range(1, len(whole)) if whole[i - 1] == "\n"]
        safe = [i for i in cut if not whole[i].isspace() and not whole[i - 2].isspace()]
        pieces = [whole[a:b] for a, b in zip([0, *safe], [*safe, len(whole)], strict=True)]
        joined = [token for ids in tokenizer.encode_batch(pieces) for token in ids]
        assert joined == tokenizer.encode(whole)


def test_the_text_of_the_special_token_stays_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a line with <|endoftext|> in it\n" * 200)
    dataset = prepare({"path": str(tmp_path / "x.txt")}, tmp_path / "d")
    tokens = dataset.split("train").tokens
    end = dataset.tokenizer().end_of_text
    assert (tokens == end).sum() == 1
    assert tokens[-1] == end


@pytest.mark.data
def test_gpt2s_two_files_tokenize_as_transformers_does(test_data: Path) -> None:
    import transformers

    ours = Tokenizer.load(test_data / "gpt2-tokenizer")
    theirs = transformers.GPT2TokenizerFast(
        vocab=str(test_data / "gpt2-tokenizer" / "vocab.json"),
        merges=str(test_data / "gpt2-tokenizer" / "merges.txt"),
    )
    text = (test_data / "tinyshakespeare" / "input.txt").read_text()[
        :50_000
    ] + " naïve 漢字 \n\n  x"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == 50257
    assert ours.end_of_text == 50256


def test_row_packing_pads_with_weight_zero(corpus: Path, tmp_path: Path) -> None:
    dataset = prepare(
        {"path": str(corpus), "documents": "line"}, tmp_path / "d", packing="greedy::truncate_right"
    )
    split = dataset.split("train")
    for index in range(20):
        tokens, targets, weights = split.sample(index, 16)
        length = int(split.reader.lengths[index])
        assert weights.tolist() == [1.0] * (length - 1) + [0.0] * (17 - length)
        assert (targets[length - 1 :] == split.end_of_text).all()
        assert np.array_equal(tokens[1:], targets[:-1])


def bad(name: str, content: bytes, tmp_path: Path, **source: object) -> None:
    (tmp_path / name).write_bytes(content)
    prepare({"path": str(tmp_path / name), **source}, tmp_path / "d")


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        bad("empty.txt", b"", tmp_path)
    with pytest.raises(DataError, match="one sequence needs 17"):
        bad("short.txt", b"too short\n", tmp_path)
    texts = (f"equal documents, text {number}" for number in itertools.count())
    held_out = next(text for text in texts if choose_split(text, (0.9, 0.05, 0.05)) != "train")
    with pytest.raises(DataError, match=r"train split has 0 of [1-9]\d+ .* share a split"):
        bad("equal.jsonl", f'{{"text": "{held_out}"}}\n'.encode() * 100, tmp_path, kind="jsonl")
    with pytest.raises(DataError, match=r"binary file \(NUL at byte 3\)"):
        bad("binary.txt", b"abc\0def" * 100, tmp_path)
    with pytest.raises(DataError, match="not UTF-8 at byte 1205"):
        bad("latin.txt", b"plain text\n" * 109 + b"plain \xff text", tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        bad("cut.gz", gzip.compress(b"text " * 1000)[:-20], tmp_path)
    for kept in (3, 9, -1):
        with pytest.raises(DataError, match="cannot be read|NUL|not UTF-8"):
            bad("cut.zst", zstandard.compress(b"text " * 1000)[:kept], tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        prepare({"path": str(tmp_path / "nowhere")}, tmp_path / "d")
    with pytest.raises(DataError, match="is not a tokenizer|no tokenizer"):
        penstock.prepare(
            source={"path": str(tmp_path / "short.txt")},
            tokenizer={"from": str(tmp_path)},
            data={"path": str(tmp_path / "d")},
        )
    with pytest.raises(ConfigError, match="not a packing"):
        prepare({"path": str(tmp_path)}, tmp_path / "d", packing="loose")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        prepare({"path": "/proc/self/mem"}, tmp_path / "d")


def test_replace_and_skip_go_on_past_bad_utf8(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "good.txt").write_text("good text here\n" * 200)
    (source / "bad.txt").write_bytes(b"bad \xff text here\n" * 200)
    replaced = prepare({"path": str(source), "on_error": "replace"}, tmp_path / "r")
    assert "\ufffd" in "".join(text_of(replaced, name) for name in replaced.manifest["splits"])
    skipped = prepare({"path": str(source), "on_error": "skip"}, tmp_path / "s")
    assert "bad" not in "".join(text_of(skipped, name) for name in skipped.manifest["splits"])


@pytest.fixture
def damaged(dataset_folder: Path, tmp_path: Path) -> Path:
    for name, content in files_of(dataset_folder).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_damaged_datasets_are_refused(damaged: Path) -> None:
    Dataset.open(damaged)
    data = (damaged / "train.bin").read_bytes()
    (damaged / "train.bin").write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"train\.bin has \d+ bytes, dataset\.json says"):
        Dataset.open(damaged)
    (damaged / "train.bin").write_bytes(b"\1" + data[1:])
    with pytest.raises(DataError, match="does not have the checksum"):
        Dataset.open(damaged)
    (damaged / "train.bin").write_bytes(data)
    manifest = json.loads((damaged / "dataset.json").read_bytes())
    for change in (
        {"files": {"../escape": {"sha256": "", "bytes": 0}}},
        {"files": {"gone.bin": {"sha256": "", "bytes": 0}}},
        {"splits": {"train": {"tokens": 1, "documents": 1, "text_bytes": 1, "words": 1}}},
        {"schema_version": 99},
        {"splits": []},
    ):
        (damaged / "dataset.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError):
            Dataset.open(damaged)
    (damaged / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        Dataset.open(damaged)
