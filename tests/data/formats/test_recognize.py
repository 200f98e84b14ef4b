"""Files are recognised by what is in them, whatever they are called."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from penstock.data.formats.recognize import recognize, recognize_file
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.errors import DataError

SEQUENCES = [TokenSequence(np.array([5, 300, 7])), TokenSequence(np.array([9, 50256, 1]))]
LAYOUT = Layout(3, padding=0, sequences=2, tokens=6, equal=True, largest=50256)


def write(name: str, folder: Path, splits: tuple[str, ...] = ("train",)) -> list[Path]:
    written: list[Path] = []
    for split in splits:
        writer = FORMATS[name].write(folder, split, LAYOUT)
        for sequence in SEQUENCES:
            writer.append(sequence)
        written += writer.finish()
    return written


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_with_three_splits(name: str, tmp_path: Path) -> None:
    write(name, tmp_path, ("train", "validation", "test"))
    found = recognize(tmp_path)
    assert found.format == name
    assert list(found.splits) == ["train", "validation", "test"]
    for files in found.splits.values():
        read = [s.tokens.tolist() for s in FORMATS[name].read(files).sequences()]
        assert [token for row in read for token in row] == [5, 300, 7, 9, 50256, 1]


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"megatron"}))
def test_the_name_of_a_file_does_not_matter(name: str, tmp_path: Path) -> None:
    for number, path in enumerate(write(name, tmp_path / "made")):
        if path.suffix in (".json", ".yaml", ".index"):
            continue
        for suffix in ("", ".txt", ".hdf5", ".bin", ".json"):
            odd = tmp_path / f"odd{number}{suffix}"
            odd.write_bytes(path.read_bytes())
            assert recognize(odd).format == name
            odd.unlink()


def test_a_megatron_pair_by_prefix_index_or_data(tmp_path: Path) -> None:
    write("megatron", tmp_path)
    for name in ("train", "train.idx", "train.bin"):
        assert recognize(tmp_path / name).format == "megatron"


def test_globs_and_a_folder_of_a_split(tmp_path: Path) -> None:
    write("tfrecord", tmp_path / "data", ("train", "test"))
    assert set(recognize(tmp_path / "data" / "*.tfrecord").splits) == {"train", "test"}
    write("cerebras", tmp_path / "c", ("train", "validation"))
    assert list(recognize(tmp_path / "c" / "validation").splits) == ["validation"]
    assert list(recognize(tmp_path / "c" / "validation" / "*.h5").splits) == ["validation"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (pickle.dumps({"a": 1}), None),
        (b'{"text": "x"}\n', None),
        (b'{"a": [1]}', None),
        (b"[1, 2]\n", "jsonl"),
        (b"  \n[1, 2]\n", "jsonl"),
        (b'{"input_ids": [' + b"1, " * 5000 + b"2]}\n", "jsonl"),
        (b"0 40\n", None),
        (b"", None),
        (b"PK\x03\x04", None),
        (b"\x80", None),
    ],
)
def test_other_content(data: bytes, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    assert recognize_file(tmp_path / "x") == expected


def test_what_is_not_known_or_not_one_thing_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("just text")
    with pytest.raises(DataError, match="no known format.*Megatron"):
        recognize(tmp_path / "a")
    with pytest.raises(DataError, match="does not exist"):
        recognize(tmp_path / "nothing")
    (tmp_path / "a.tfrecord").write_bytes(b"\x0a" + bytes(40))
    with pytest.raises(DataError, match="no known format: as TFRecord.* it is damaged"):
        recognize(tmp_path / "a.tfrecord")
    (tmp_path / "a.tfrecord").unlink()
    write("jsonl", tmp_path)
    write("npy", tmp_path)
    with pytest.raises(DataError, match="jsonl and npy"):
        recognize(tmp_path)
    with h5py.File(tmp_path / "h", "w") as file:
        file["x"] = [1]
    with pytest.raises(DataError, match="is HDF5 with x"):
        recognize(tmp_path / "h")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "missing.arrow", ".."])
def test_a_saved_folder_may_name_only_its_own_files(name: str, tmp_path: Path) -> None:
    write("arrow", tmp_path / "d")
    (tmp_path / "secret").write_bytes(b"")
    state = tmp_path / "d" / "train" / "state.json"
    state.write_text(state.read_text().replace("data-00000-of-00001.arrow", name))
    with pytest.raises(DataError, match="which is not in the folder"):
        recognize(tmp_path / "d")


def test_the_documentation_has_a_row_for_each_format() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "formats.md"
    rows = [
        line.split("|")[1].strip() for line in page.read_text().splitlines() if line[:3] == "| `"
    ]
    assert [row.strip("`") for row in rows[1:]] == list(FORMATS)
