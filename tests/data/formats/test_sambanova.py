"""SambaNova's HDF5: the golden files of its own tool, layout by h5py, and what is refused."""

import hashlib
import json
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from penstock.data.formats.sambanova import Reader, Writer
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.errors import DataError

GOLDEN = ("pretraining_txt", "generative_tuning", "dialogue")
END_OF_TEXT = 50256


@pytest.mark.data
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_are_written_again_array_for_array(
    name: str, test_data: Path, tmp_path: Path
) -> None:
    golden = test_data / "sambanova-prep" / name / "expected.hdf5"
    reader = Reader(golden)
    writer = Writer(tmp_path, "train", Layout(1024, padding=END_OF_TEXT, vocab_size=50257))
    for sequence in reader.sequences():
        writer.append(sequence)
    writer.finish()
    with h5py.File(golden) as theirs, h5py.File(tmp_path / "train_1_of_1.hdf5") as ours:
        assert set(ours) == set(theirs) == {"input_ids", "token_type_ids"}
        assert reader.facts.sequences == len(theirs["input_ids"])
        for key in theirs:
            a, b = ours[key], theirs[key]
            np.testing.assert_array_equal(a[:], b[:])
            for fact in ("dtype", "shape", "maxshape", "chunks", "compression"):
                assert getattr(a, fact) == getattr(b, fact), fact
            assert a.compression_opts == b.compression_opts
            assert dict(a.attrs) == dict(b.attrs)
        assert dict(ours.attrs) == dict(theirs.attrs)


@pytest.mark.data
@pytest.mark.parametrize("name", GOLDEN)
def test_loss_weights_are_the_completions_and_separators(name: str, test_data: Path) -> None:
    golden = test_data / "sambanova-prep" / name / "expected.hdf5"
    with h5py.File(golden) as file:
        roles = file["token_type_ids"][:]
    weighing = sum(float(s.loss_weights().sum()) for s in Reader(golden).sequences())
    assert weighing == np.isin(roles, (1, 3)).sum()
    tokens = sum(len(s.tokens) for s in Reader(golden).sequences())
    assert tokens == (roles != 2).sum()


def test_metadata_and_checksums_of_all_splits(tmp_path: Path) -> None:
    layout = Layout(4, padding=9, vocab_size=10)
    for split, rows in (("train", 3), ("validation", 2), ("test", 1)):
        writer = Writer(tmp_path, split, layout)
        for _ in range(rows):
            writer.append(TokenSequence(np.array([1, 2, 9]), np.array([0, 1, 1], np.float32)))
        writer.finish()
    values = yaml.safe_load((tmp_path / "metadata.yaml").read_text())
    expected = {
        "max_seq_length": 4,
        "vocab_size": 10,
        "token_type_ids": True,
        "number_of_training_files": 1,
        "number_of_dev_files": 1,
        "number_of_test_files": 1,
        "max_batch_size_train": 3,
        "max_batch_size_dev": 2,
        "train_sequences": 3,
        "train_prompt_tokens": 3,
        "train_completion_tokens": 6,
        "train_padding_tokens": 3,
    }
    assert expected.items() <= values.items()
    with h5py.File(tmp_path / "dev_1_of_1.hdf5") as file:
        assert file["input_ids"][0].tolist() == [1, 2, 9, 9]
        assert file["token_type_ids"][0].tolist() == [0, 1, 3, 2]
    sums = json.loads((tmp_path / "sha256" / "files_metadata.json").read_text())
    assert {"train_1_of_1.hdf5", "dev_1_of_1.hdf5", "test_1_of_1.hdf5"} <= sums.keys()
    data = (tmp_path / "test_1_of_1.hdf5").read_bytes()
    assert sums["test_1_of_1.hdf5"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert sums["test_1_of_1.hdf5"]["size"] == len(data)
    assert Reader(tmp_path / "test_1_of_1.hdf5").facts.vocab_size == 10


def test_an_abandoned_split_leaves_no_file(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "train", Layout(4))
    writer.append(TokenSequence(np.array([1])))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def plain(file: h5py.File) -> None:
    file["input_ids"] = np.ones((2, 4), np.int32)
    file["token_type_ids"] = np.ones((2, 4), np.int32)


def replaced(name: str, value: object) -> object:
    def change(file: h5py.File) -> None:
        plain(file)
        del file[name]
        file[name] = value

    return change


def external(file: h5py.File) -> None:
    plain(file)
    del file["input_ids"]
    secret = Path(file.filename).with_name("secret")
    secret.write_bytes(bytes(32))
    file.create_dataset("input_ids", (2, 4), np.int32, external=[(str(secret), 0, 32)])


def virtual(file: h5py.File) -> None:
    plain(file)
    del file["input_ids"]
    other = Path(file.filename).with_name("other.h5")
    with h5py.File(other, "w") as source:
        source["x"] = np.ones((2, 4), np.int32)
    layout = h5py.VirtualLayout((2, 4), np.int32)
    layout[:] = h5py.VirtualSource(other, "x", (2, 4))
    file.create_virtual_dataset("input_ids", layout)


def bomb(file: h5py.File) -> None:
    for name in ("input_ids", "token_type_ids"):
        file.create_dataset(name, (1 << 40, 1024), np.int32, chunks=(64, 1024))


def swollen(file: h5py.File) -> None:
    """A chunk of 4 KiB that unpacks to 64 MiB."""
    import zlib

    for name in ("input_ids", "token_type_ids"):
        data = file.create_dataset(name, (1, 1024), np.int32, chunks=(1, 1024), compression="gzip")
        packed = zlib.compress(bytes(4 << 20), 9)
        assert len(packed) < 5000
        data.id.write_direct_chunk((0, 0), packed)


def scaled(file: h5py.File) -> None:
    plain(file)
    del file["input_ids"]
    file.create_dataset("input_ids", (2, 4), np.int32, scaleoffset=3)


def torn(file: h5py.File) -> None:
    for name in ("input_ids", "token_type_ids"):
        data = file.create_dataset(name, (1, 64), np.int32, chunks=(1, 64), compression="lzf")
        data.id.write_direct_chunk((0, 0), b"\x00\x01\xff")


def missing_chunk(file: h5py.File) -> None:
    for name in ("input_ids", "token_type_ids"):
        file.create_dataset(name, (8, 4), np.int32, chunks=(4, 4))[:4] = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (replaced("input_ids", h5py.ExternalLink("/etc/passwd", "/x")), "a link elsewhere"),
        (replaced("input_ids", h5py.SoftLink("/token_type_ids")), "a link elsewhere"),
        (replaced("input_ids", np.ones((2, 4), np.int64)), "holds int64"),
        (replaced("input_ids", np.ones((2, 4), np.float32)), "holds float32"),
        (replaced("input_ids", np.ones((2, 4), ">i4")), "holds >i4"),
        (replaced("input_ids", np.ones((2, 5), np.int32)), "but token_type_ids"),
        (replaced("input_ids", np.ones(8, np.int32)), "no array of 2 dimensions"),
        (replaced("token_type_ids", np.full((2, 4), 4, np.int32)), "not 0, 1, 2 or 3"),
        (replaced("token_type_ids", np.full((2, 4), -1, np.int32)), "not 0, 1, 2 or 3"),
        (external, "other files"),
        (virtual, "other files"),
        (bomb, "claims"),
        (swollen, "unpacks to too much"),
        (scaled, "other than gzip and lzf"),
        (torn, "damaged chunk"),
        (replaced("input_ids", np.ones((2, 0), np.int32)), "rows without elements"),
        (missing_chunk, "lacks the rows from 4"),
        (lambda file: None, "is missing"),
    ],
)
def test_what_no_plain_writer_makes_is_refused(make, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        make(file)
    with pytest.raises(DataError, match=message):
        list(Reader(path).sequences())


@pytest.mark.parametrize("chunks", [None, (1, 4)])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("of the other", "lie over one another"),
        (-8, "ends before|outside the file|not a readable|lacks the rows|has a chunk of"),
        (1 << 40, "ends before|outside the file|not a readable|has a chunk of"),
    ],
)
def test_offsets_outside_negative_or_overlapping_are_refused(
    place: int | str, message: str, chunks: tuple[int, int] | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        for name in ("input_ids", "token_type_ids"):
            file.create_dataset(name, data=np.ones((2, 4), np.int32), chunks=chunks)
        places = [
            file[name].id.get_chunk_info(0).byte_offset if chunks else file[name].id.get_offset()
            for name in ("input_ids", "token_type_ids")
        ]
    data = path.read_bytes()
    other, right = (struct.pack("<q", one) for one in places)
    lying = other if isinstance(place, str) else struct.pack("<q", place)
    assert data.count(right) == 1
    path.write_bytes(data.replace(right, lying))
    with pytest.raises(DataError, match=message):
        list(Reader(path).sequences())


@pytest.mark.parametrize("filters", [{}, {"shuffle": True, "compression": "gzip"}])
def test_other_plain_storage_is_read(filters: dict, tmp_path: Path) -> None:
    ids = np.arange(5000 * 4, dtype=np.int32).reshape(5000, 4)
    with h5py.File(tmp_path / "x", "w") as file:
        file.create_dataset("input_ids", data=ids, **filters)
        file.create_dataset("token_type_ids", data=np.ones_like(ids), **filters)
    read = np.stack([s.tokens for s in Reader(tmp_path / "x").sequences()])
    np.testing.assert_array_equal(read, ids)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x", "w") as file:
        plain(file)
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "y").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        Reader(tmp_path / "y")
