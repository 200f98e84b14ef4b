"""Arrow and Parquet: pyarrow's own files, what `datasets` saves, and damage."""

import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from penstock.data.formats.arrow import Reader, recognises
from penstock.data.formats.arrow_writers import ParquetWriter, SavedFolderWriter
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.errors import DataError


def save(table: pa.Table, path: Path, kind: str) -> Path:
    if kind == "parquet":
        pa.parquet.write_table(table, path)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with path.open("wb") as handle, new(handle, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


def read(path: Path) -> list[tuple[list[int], list[float]]]:
    return [(s.tokens.tolist(), s.loss_weights().tolist()) for s in Reader(path).sequences()]


LISTS = [[1, 2, 3], [], [70000, 0, 5, 6]]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list])
@pytest.mark.parametrize("item", [pa.int32(), pa.int64(), pa.uint32()])
def test_what_pyarrow_writes_is_read(kind: str, list_of, item, tmp_path: Path) -> None:
    table = pa.table({"other": ["a", "b", "c"], "input_ids": pa.array(LISTS, list_of(item))})
    path = save(table, tmp_path / "x", kind)
    assert recognises(path.read_bytes()[:16])
    assert read(path) == [(tokens, [1.0] * len(tokens)) for tokens in LISTS]


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_columns_of_a_tokenized_dataset(kind: str, tmp_path: Path) -> None:
    table = pa.table(
        {
            "input_ids": [[1, 2, 0], [3, 4, 5]],
            "attention_mask": [[1, 1, 0], [1, 1, 1]],
            "labels": [[-100, 2, -100], [3, 4, 5]],
            "token_type_ids": [[0, 0, 0], [0, 0, 0]],
        }
    )
    path = save(table, tmp_path / "x", kind)
    assert read(path) == [([1, 2], [0, 1]), ([3, 4, 5], [1, 1, 1])]
    assert "segments" in Reader(path).facts.notes[0]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_sliced_lists_and_fixed_sizes(kind: str, tmp_path: Path) -> None:
    whole = pa.array([[i, i + 1] for i in range(9)], pa.list_(pa.int32(), 2))
    path = save(pa.table({"input_ids": whole.slice(3)}), tmp_path / "x", kind)
    assert [tokens for tokens, _ in read(path)] == [[i, i + 1] for i in range(3, 9)]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_a_column_of_text_is_found(kind: str, tmp_path: Path) -> None:
    path = save(pa.table({"id": [1, 2], "text": ["a", "ü"]}), tmp_path / "x", kind)
    reader = Reader(path)
    assert reader.text_column == "text"
    assert list(reader.texts()) == ["a", "ü"]
    with pytest.raises(DataError, match="set tokenizer.from=FOLDER"):
        list(reader.sequences())


SEQUENCES = [
    TokenSequence(np.array([1, 2, 70000])),
    TokenSequence(np.array([], np.int64)),
    TokenSequence(np.array([4, 5]), np.array([0, 0.25], np.float32)),
]


def write(kind, folder: Path, split: str = "train") -> Path:
    writer = kind(folder, split, Layout(3, weights=True))
    for sequence in SEQUENCES:
        writer.append(sequence)
    return writer.finish()[0]


def test_parquet_is_read_by_pyarrow(tmp_path: Path) -> None:
    path = write(ParquetWriter, tmp_path)
    table = pa.parquet.read_table(path)
    assert table.schema.field("input_ids").type == pa.list_(pa.field("element", pa.int32()))
    assert table.to_pydict() == {
        "input_ids": [[1, 2, 70000], [], [4, 5]],
        "loss_weights": [[1, 1, 1], [], [0, 0.25]],
    }
    assert read(path) == [([1, 2, 70000], [1, 1, 1]), ([], []), ([4, 5], [0, 0.25])]


def test_a_saved_folder_has_what_datasets_looks_for(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(SavedFolderWriter, tmp_path, split)
    assert json.loads((tmp_path / "dataset_dict.json").read_text()) == {"splits": ["train", "test"]}
    state = json.loads((tmp_path / "train" / "state.json").read_text())
    (entry,) = state["_data_files"]
    with pa.ipc.open_stream(tmp_path / "train" / entry["filename"]) as stream:
        assert stream.read_all()["input_ids"].to_pylist() == [[1, 2, 70000], [], [4, 5]]
    assert (tmp_path / "test" / "dataset_info.json").is_file()


@pytest.mark.peer
def test_datasets_itself_opens_a_saved_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for split in ("train", "test"):
        write(SavedFolderWriter, tmp_path, split)
    loaded = datasets.load_from_disk(str(tmp_path))
    assert set(loaded) == {"train", "test"}
    assert loaded["train"][:]["input_ids"] == [[1, 2, 70000], [], [4, 5]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"input_ids": [[1.5]]}, "type list<.*double>"),
        ({"input_ids": [1]}, "no list of integers"),
        ({"input_ids": [["a"]]}, "no list of integers"),
        ({"input_ids": [[1], None]}, "rows that are null"),
        ({"input_ids": [[1, None]]}, "tokens that are null"),
        ({"input_ids": [[1]], "loss_weights": [[1.0, 2.0]]}, "has 1 tokens but loss_weights"),
        ({"x": [1], "y": ["a"], "z": ["b"]}, "no input_ids nor text"),
        ({"text": ["a", None]}, "set tokenizer.from"),
    ],
)
def test_other_tables_are_refused(table: dict, message: str, tmp_path: Path) -> None:
    path = save(pa.table(table), tmp_path / "x", "parquet")
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.parametrize("offsets", [(0, 2, 1 << 28), (0, -2, 3), (-1, 2, 3), (0, 3, 2)])
@pytest.mark.parametrize("kind", ["stream", "file"])
def test_offsets_outside_negative_or_overlapping_are_refused(
    offsets: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    path = save(pa.table({"input_ids": [[1, 2], [3]]}), tmp_path / "x", kind)
    data = path.read_bytes()
    right, lying = struct.pack("<3i", 0, 2, 3), struct.pack("<3i", *offsets)
    assert data.count(right) == 1
    path.write_bytes(data.replace(right, lying))
    with pytest.raises(DataError, match="does not read"):
        read(path)


def test_a_footer_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    table = pa.table({"input_ids": [np.zeros(4_000_000, np.int32)]})
    path = save(table, tmp_path / "x", "parquet")
    assert path.stat().st_size < 16_000
    with pytest.raises(DataError, match="claims 4,000,000 values"):
        read(path)


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_truncated_files_are_refused(kind: str, tmp_path: Path) -> None:
    table = pa.table({"input_ids": [list(range(500))] * 20})
    path = save(table, tmp_path / "x", kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="does not read"):
        read(path)
