"""Conversion between any two formats: what both can hold comes through, what is lost is said."""

import json
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cli import main
from penstock.config.data import DataSection, TokenizerSection
from penstock.data.convert import DatasetConversion, convert_dataset
from penstock.data.formats.recognize import recognize
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.errors import UserError

PADDING = 0
NAMES = sorted(FORMATS)
SHARED = Path("/dev/shm")
"""In memory where there is such a folder: each conversion is made durable, dozens a second."""


def write(name: str, folder: Path, sequences: list[TokenSequence], width: int = 12) -> None:
    """Sequences in a format, through its writer alone."""
    lengths = {len(s.tokens) for s in sequences}
    layout = Layout(
        width if FORMATS[name].fixed_width else max(lengths),
        padding=PADDING,
        sequences=len(sequences),
        tokens=sum(len(s.tokens) for s in sequences),
        equal=len(lengths) == 1,
        largest=max(max(s.tokens.tolist(), default=0) for s in sequences),
        weights=any(s.weights is not None for s in sequences),
        roles=any(s.roles is not None for s in sequences),
    )
    writer = FORMATS[name].write(folder, "train", layout)
    for sequence in sequences:
        writer.append(sequence)
    writer.finish()


def read(folder: Path) -> list[tuple[list[int], list[float]]]:
    found = recognize(folder)
    reader = FORMATS[found.format].read(found.splits["train"])
    return [(s.tokens.tolist(), s.loss_weights().tolist()) for s in reader.sequences()]


def convert(source: Path, out: Path, name: str, **data: object) -> DatasetConversion:
    section = DataSection.model_validate({"format": name, **data})
    return convert_dataset(source, out, section, TokenizerSection())


def plain(sequences: list[TokenSequence]) -> list[tuple[list[int], list[float]]]:
    return [(s.tokens.tolist(), s.loss_weights().tolist()) for s in sequences]


def held(sequences: list[TokenSequence], name: str) -> list[TokenSequence]:
    """What a format keeps of sequences, from what docs/formats.md says of it."""
    streams = ("nanogpt", "llmc")
    unequal = len({len(s.tokens) for s in sequences}) > 1
    if name in streams or (name == "npy" and unequal):
        return [TokenSequence(np.concatenate([s.tokens for s in sequences]))]
    if name in ("npy", "pickle"):
        return [TokenSequence(s.tokens) for s in sequences]
    if name == "sambanova":
        return [TokenSequence(s.tokens, binary(s.weights)) for s in sequences]
    if name == "cerebras":
        return [TokenSequence(s.tokens, first_from_others(binary(s.weights))) for s in sequences]
    return sequences


def binary(weights: np.ndarray | None) -> np.ndarray | None:
    return None if weights is None else (weights > 0).astype(np.float32)


def first_from_others(weights: np.ndarray | None) -> np.ndarray | None:
    if weights is None:
        return None
    return np.append(np.float32((weights[1:] > 0).all()), weights[1:])


@st.composite
def sequence(draw: st.DrawFn) -> TokenSequence:
    """From one token, none of them padding: what a format does with padding has its own tests."""
    # A last id below 256 has a NUL byte, without which a bare stream could be text.
    tokens = [*draw(st.lists(st.integers(1, 50303), max_size=11)), draw(st.integers(1, 255))]
    weights = draw(
        st.none()
        | st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=len(tokens), max_size=len(tokens))
    )
    array = None if weights is None or set(weights) == {1.0} else np.array(weights, np.float32)
    return TokenSequence(np.array(tokens, np.int64), array)


@pytest.mark.parametrize("source", NAMES)
@settings(max_examples=6, deadline=None)
@given(sequences=st.lists(sequence(), min_size=1, max_size=6))
def test_any_dataset_passes_through_any_two_formats(
    source: str, sequences: list[TokenSequence]
) -> None:
    with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as folder:
        pass_through_all(source, sequences, Path(folder))


def pass_through_all(source: str, sequences: list[TokenSequence], root: Path) -> None:
    write(source, root / source, sequences)
    first = held(sequences, source)
    assert read(root / source) == plain(first)
    for target in NAMES:
        done = convert(root / source, root / f"to {target}", target)
        expected = plain(held(first, target))
        assert read(root / f"to {target}") == expected
        # What is said to be lost is what is lost.
        assert bool(done.lost) == (expected != plain(first)), (target, done.lost)
        assert sum(c["tokens"] for c in done.splits.values()) == sum(len(s.tokens) for s in first)


@pytest.mark.data
@pytest.mark.parametrize("through", ["parquet", "jsonl", "arrow", "tfrecord"])
@pytest.mark.parametrize("name", ["pretraining_txt", "generative_tuning", "dialogue"])
def test_golden_files_pass_through_formats_that_hold_roles(
    name: str, through: str, test_data: Path, tmp_path: Path
) -> None:
    golden = test_data / "sambanova-prep" / name / "expected.hdf5"
    vocabulary = TokenizerSection.model_validate({"from": str(test_data / "gpt2-tokenizer")})
    section = DataSection.model_validate({"format": through})
    assert convert_dataset(golden, tmp_path / "a", section, vocabulary).lost == []
    section = DataSection.model_validate({"format": "sambanova", "sequence_length": 1024})
    assert convert_dataset(tmp_path / "a", tmp_path / "b", section, vocabulary).lost == []
    with h5py.File(golden) as a, h5py.File(tmp_path / "b" / "train_1_of_1.hdf5") as b:
        for key in ("input_ids", "token_type_ids"):
            np.testing.assert_array_equal(a[key][:], b[key][:])


WEIGHTED = TokenSequence(np.array([1, 2, 3]), np.array([0, 0.5, 1], np.float32))
ROLES = TokenSequence(
    np.array([1, 2, 3]), np.array([0, 1, 1], np.float32), np.array([0, 1, 3], np.uint8)
)
SHORT = TokenSequence(np.array([4]))
PADLIKE = TokenSequence(np.array([1, 0]), np.array([0, 0], np.float32))


@pytest.mark.parametrize(
    ("sequences", "target", "lost"),
    [
        ([WEIGHTED], "sambanova", ["loss weights other than 0 and 1"]),
        ([WEIGHTED], "npy", ["loss weights"]),
        ([WEIGHTED, SHORT], "nanogpt", ["borders between sequences", "loss weights"]),
        ([ROLES], "megatron", ["roles of tokens"]),
        ([ROLES], "sambanova", []),
        ([SHORT, SHORT], "npy", []),
        ([PADLIKE], "cerebras", ["the end of sequences that end like padding"]),
        ([PADLIKE], "parquet", []),
    ],
)
def test_what_is_lost_is_said_in_one_line(
    sequences: list[TokenSequence],
    target: str,
    lost: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("jsonl", tmp_path / "in", sequences)
    assert convert(tmp_path / "in", tmp_path / "out", target).lost == lost
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot hold" in line]
    assert len(said) == bool(lost)
    for what in lost:
        assert what in said[0]


def test_long_sequences_are_cut_and_each_token_stays_a_target(tmp_path: Path) -> None:
    long = TokenSequence(np.arange(1, 11), np.arange(10) % 2 == np.ones(10))
    write("parquet", tmp_path / "in", [TokenSequence(long.tokens, long.weights.astype(np.float32))])
    convert(tmp_path / "in", tmp_path / "s", "sambanova", sequence_length=4)
    assert [tokens for tokens, _ in read(tmp_path / "s")] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    done = convert(tmp_path / "in", tmp_path / "c", "cerebras", sequence_length=4)
    assert done.lost[0] == "1 sequences of more than 4 tokens in one piece"
    rows = read(tmp_path / "c")
    assert [tokens for tokens, _ in rows] == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10]]
    assert [w for _, weights in rows for w in weights[1:]] == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_greedy_packing_makes_five_rows(tmp_path: Path) -> None:
    write("jsonl", tmp_path / "in", [TokenSequence(np.array([5, 6, 7])), SHORT, WEIGHTED])
    convert(
        tmp_path / "in", tmp_path / "out", "cerebras", packing="greedy::drop", sequence_length=9
    )
    with h5py.File(tmp_path / "out" / "train" / "data-00000.h5") as file:
        assert file["data"].shape == (1, 5, 9)
    assert [tokens for tokens, _ in read(tmp_path / "out")] == [[5, 6, 7], [4], [1, 2, 3]]


def test_text_is_tokenized_with_the_tokenizer_that_is_named(
    test_data: Path, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["Hello world", "Hello"]}), tmp_path / "x")
    section = DataSection.model_validate({"format": "jsonl"})
    with pytest.raises(UserError, match="set tokenizer.from=FOLDER"):
        convert_dataset(tmp_path / "x", tmp_path / "out", section, TokenizerSection())
    gpt2 = TokenizerSection.model_validate({"from": str(test_data / "gpt2-tokenizer")})
    convert_dataset(tmp_path / "x", tmp_path / "out", section, gpt2)
    assert [t for t, _ in read(tmp_path / "out")] == [[15496, 995, 50256], [15496, 50256]]


def test_ids_beyond_the_vocabulary_are_refused_before_anything_is_written(
    test_data: Path, tmp_path: Path
) -> None:
    write("jsonl", tmp_path / "in", [TokenSequence(np.array([50256, 50257]))])
    gpt2 = TokenizerSection.model_validate({"from": str(test_data / "gpt2-tokenizer")})
    with pytest.raises(UserError, match="50257, which is no token id from 0 to 50256"):
        convert_dataset(tmp_path / "in", tmp_path / "out", DataSection(), gpt2)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out={tmp}/out"], "no dataset to read (from): set from=PATH"),
        (["from={tmp}/in"], "no folder to write"),
        (["from={tmp}/nothing", "out={tmp}/out"], "does not exist"),
        (["from={tmp}/in", "out={tmp}/in"], "is not empty"),
        (["from={tmp}/in", "out={tmp}/out", "data.format=nanogpt"], "cannot hold token 70000"),
        (["from={tmp}/in", "out={tmp}/out", "data.packing=greedy::drop"], "does not pack"),
        (["from={tmp}/in", "out={tmp}/out", "data.format=csv"], "data.format=csv is wrong"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("jsonl", tmp_path / "in", [TokenSequence(np.array([1, 70000]))])
    assert main(["convert", "dataset", *(w.format(tmp=tmp_path) for w in words)]) == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("target", "longest"),
    [
        ("sambanova", 1 << 20),
        ("cerebras", (1 << 20) + 1),
        ("tfrecord", 1 << 22),
        ("jsonl", 1 << 22),
    ],
)
def test_a_stream_needs_a_length_for_rows_and_records(
    target: str, longest: int, tmp_path: Path
) -> None:
    write("llmc", tmp_path / "in", [TokenSequence(np.ones(longest + 1, np.int64))])
    with pytest.raises(UserError, match="set data.sequence_length"):
        convert(tmp_path / "in", tmp_path / "out", target)
    done = convert(tmp_path / "in", tmp_path / "out", target, sequence_length=1 << 19)
    assert done.splits["train"]["sequences"] > 2


def test_the_command_line_converts_and_inspects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("jsonl", tmp_path / "in", [ROLES, SHORT])
    words = [f"from={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "data.format=sambanova"]
    assert main(["convert", "dataset", *words, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["files"][0] == "train_1_of_1.hdf5"
    assert done["splits"] == {"train": {"sequences": 2, "tokens": 4}}
    for path in (tmp_path / "out", tmp_path / "out" / "train_1_of_1.hdf5"):
        assert main(["inspect", str(path), "--json"]) == 0
        seen = json.loads(capsys.readouterr().out)
        assert (seen["kind"], seen["format"]) == ("data", "sambanova")
        assert seen["splits"]["train"]["begins"] == [1, 2, 3]
        assert seen["splits"]["train"]["tokens"] == 4
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "SambaNova HDF5" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_inspect_recognises_each_format(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(name, tmp_path / "in", [TokenSequence(np.array([1, 2, 300]))])
    assert main(["inspect", str(tmp_path / "in"), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["format"] == name
    assert seen["splits"]["train"]["begins"] == [1, 2, 300]
    assert main(["inspect", str(tmp_path / "in")]) == 0


def test_a_prepared_dataset_is_converted_with_its_splits(
    dataset_folder: Path, tmp_path: Path
) -> None:
    done = convert(dataset_folder, tmp_path / "out", "sambanova", sequence_length=64)
    assert set(done.splits) == {"train", "validation", "test"}
    manifest = json.loads((dataset_folder / "dataset.json").read_text())
    for split, counts in done.splits.items():
        assert counts["tokens"] == manifest["splits"][split]["tokens"]
    with h5py.File(tmp_path / "out" / "dev_1_of_1.hdf5") as file:
        assert file["input_ids"].shape[1] == 64
    assert "vocab_size: 512" in (tmp_path / "out" / "metadata.yaml").read_text()
    # The tokenizer goes along, and is found there again.
    back = convert(tmp_path / "out", tmp_path / "back", "megatron")
    assert any("`train` opens" in note for note in back.notes)


def test_splits_share_one_width_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text("[1, 2, 3, 4, 5]\n[6]\n")
    (tmp_path / "in" / "val.jsonl").write_text("[7]\n")
    (tmp_path / "in" / "test.jsonl").write_text("[]\n")
    done = convert(tmp_path / "in", tmp_path / "out", "sambanova")
    assert list(done.splits) == ["train", "validation"]
    for name in ("train", "dev"):
        with h5py.File(tmp_path / "out" / f"{name}_1_of_1.hdf5") as file:
            assert file["input_ids"].shape[1] == 5
    assert "max_seq_length: 5" in (tmp_path / "out" / "metadata.yaml").read_text()
    assert not (tmp_path / "out" / "test_1_of_1.hdf5").exists()
    (tmp_path / "in" / "train.jsonl").unlink()
    (tmp_path / "in" / "val.jsonl").unlink()
    with pytest.raises(UserError, match="holds no tokens"):
        convert(tmp_path / "in", tmp_path / "none", "sambanova")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    write("jsonl", tmp_path / "in", [SHORT, SHORT])
    with (tmp_path / "in" / "train.jsonl").open("a") as handle:
        handle.write("broken\n")
    with pytest.raises(UserError, match="train.jsonl:3"):
        convert(tmp_path / "in", tmp_path / "out", "parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.data
def test_data_of_others_becomes_a_dataset_to_train_on(test_data: Path, tmp_path: Path) -> None:
    from penstock.data.dataset import Dataset
    from penstock.data.loader import Loader

    golden = test_data / "sambanova-prep" / "generative_tuning" / "expected.hdf5"
    gpt2 = TokenizerSection.model_validate({"from": str(test_data / "gpt2-tokenizer")})
    convert_dataset(golden, tmp_path / "out", DataSection(), gpt2)
    dataset = Dataset.open(tmp_path / "out")
    split = dataset.split("train")
    with h5py.File(golden) as file:
        ids, roles = file["input_ids"][:], file["token_type_ids"][:]
    assert split.samples(1023) == split.documents == len(ids)
    for row in (0, 50, 98):
        inputs, targets, weights = split.sample(row, 1023)
        real = roles[row] != 2
        np.testing.assert_array_equal(inputs[real[:-1]], ids[row, :-1][real[:-1]])
        np.testing.assert_array_equal(targets[real[1:]], ids[row, 1:][real[1:]])
        np.testing.assert_array_equal(weights, np.isin(roles[row, 1:], (1, 3)))
    assert dataset.split("validation").token_count == 0
    samples = dataset.training("train", 1023, 0)
    loader = Loader(samples, sequence_length=1023, batch_size=2, micro=2)
    batch = loader.micro_batches(0)[0]
    assert batch.tokens.shape == (2, 1023)


@pytest.mark.data
def test_text_becomes_the_dataset_prepare_makes(test_data: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    import penstock
    from penstock.data.dataset import Dataset

    lines = (test_data / "sst2" / "dev.tsv").read_text().splitlines()[:200]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    penstock.prepare(
        source={"path": str(tmp_path / "x.txt"), "documents": "line"},
        tokenizer={"from": str(test_data / "gpt2-tokenizer")},
        data={"path": str(tmp_path / "prepared"), "splits": [1, 0, 0]},
        prepare={"workers": 1},
    )
    pyarrow.parquet.write_table(pa.table({"text": lines}), tmp_path / "x.parquet")
    gpt2 = TokenizerSection.model_validate({"from": str(test_data / "gpt2-tokenizer")})
    convert_dataset(tmp_path / "x.parquet", tmp_path / "out", DataSection(), gpt2)
    ours, theirs = Dataset.open(tmp_path / "out"), Dataset.open(tmp_path / "prepared")
    np.testing.assert_array_equal(ours.split("train").tokens, theirs.split("train").tokens)
    assert (
        ours.manifest["splits"]["train"]["tokens"] == theirs.manifest["splits"]["train"]["tokens"]
    )
    assert ours.tokenizer_sha256 == theirs.tokenizer_sha256
