"""Cerebras' HDF5: layout by h5py, both polarities of the mask, three and five rows."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from penstock.data.formats.cerebras import Reader, Writer
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.errors import DataError

PAD = 0


def by_hand(path: Path, rows: list[list[list[int]]], inverted: bool = False) -> None:
    """A file as the Model Zoo makes it, by h5py alone."""
    data = np.array(rows, np.int32)
    if inverted:
        data[:, 1] = 1 - data[:, 1]
    with h5py.File(path, "w") as file:
        file.attrs["n_examples"] = len(data)
        file.create_dataset(
            "data", data=data, dtype="i4", chunks=(1, *data.shape[1:]), compression="gzip"
        )


def read(*paths: Path) -> list[tuple[list[int], list[float]]]:
    return [(s.tokens.tolist(), s.loss_weights().tolist()) for s in Reader(paths).sequences()]


PROMPTED = [
    # ids, mask, labels: prompt 5 6, completion 7 8, padding
    [[5, 6, 7, 8, PAD, PAD], [0, 1, 1, 0, 0, 0], [6, 7, 8, PAD, PAD, PAD]],
    [[5, 6, 7, 4, 3, 2], [0, 0, 1, 1, 1, 1], [6, 7, 4, 3, 2, 1]],
]
PROMPTED_READ = [
    ([5, 6, 7, 8], [0, 0, 1, 1]),
    ([5, 6, 7, 4, 3, 2, 1], [0, 0, 0, 1, 1, 1, 1]),
]


@pytest.mark.parametrize("inverted", [False, True])
def test_both_meanings_of_the_mask_read_the_same_and_are_said(
    inverted: bool, tmp_path: Path
) -> None:
    by_hand(tmp_path / "a.h5", PROMPTED, inverted)
    assert read(tmp_path / "a.h5") == PROMPTED_READ
    notes = " ".join(Reader([tmp_path / "a.h5"]).facts.notes)
    assert ("outside the loss" if inverted else "in the loss") in notes
    assert f"it is {int(inverted)} on padding (id 0)" in notes


@pytest.mark.parametrize("inverted", [False, True])
def test_full_rows_without_padding_are_in_the_loss(inverted: bool, tmp_path: Path) -> None:
    # The second row ends in a run of one id: no padding, though it looks like it.
    rows = [[[1, 2, 3], [1, 1, 1], [2, 3, 4]], [[5, 6, 6], [1, 1, 1], [6, 6, 6]]]
    by_hand(tmp_path / "a.h5", rows, inverted)
    assert read(tmp_path / "a.h5") == [([1, 2, 3, 4], [1.0] * 4), ([5, 6, 6, 6], [1.0] * 4)]


def test_files_of_a_folder_share_one_decision(tmp_path: Path) -> None:
    by_hand(tmp_path / "a.h5", [PROMPTED[1]], inverted=True)
    by_hand(tmp_path / "b.h5", [PROMPTED[0]], inverted=True)
    assert read(tmp_path / "a.h5", tmp_path / "b.h5") == PROMPTED_READ[::-1]


def test_a_stated_polarity_is_taken(tmp_path: Path) -> None:
    by_hand(tmp_path / "a.h5", [[[1, 2], [0, 0], [2, 3]]])
    (tmp_path / "data_params.json").write_text(json.dumps({"dataset": {"inverted_mask": False}}))
    assert read(tmp_path / "a.h5") == [([1, 2, 3], [0, 0, 0])]


def test_five_rows_hold_several_sequences(tmp_path: Path) -> None:
    row = [
        [1, 2, 3, 7, 8, PAD],
        [1, 1, 1, 0, 1, 0],
        [2, 3, 4, 8, 9, PAD],
        [2, 1, 0, 1, 0, 0],
        [0, 1, 2, 0, 1, 0],
    ]
    (tmp_path / "data_params.json").write_text(json.dumps({"post-process": {"pad_id": PAD}}))
    by_hand(tmp_path / "a.h5", [row])
    assert read(tmp_path / "a.h5") == [([1, 2, 3, 4], [1.0] * 4), ([7, 8, 9], [0, 0, 1])]


def test_five_rows_that_were_shifted_as_one(tmp_path: Path) -> None:
    row = [
        [1, 2, 3, 7, 8, PAD],
        [1, 1, 0, 1, 1, 0],
        [2, 3, 7, 8, 9, PAD],
        [2, 1, 0, 1, 0, 0],
        [0, 1, 2, 0, 1, 0],
    ]
    (tmp_path / "data_params.json").write_text(json.dumps({"post-process": {"pad_id": PAD}}))
    by_hand(tmp_path / "a.h5", [row])
    assert read(tmp_path / "a.h5") == [([1, 2, 3], [1.0] * 3), ([7, 8, 9], [1.0] * 3)]


SEQUENCES = [
    TokenSequence(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1], np.float32)),
    TokenSequence(np.array([5, 6, 7, 4, 3, 2, 1]), np.array([0, 0, 0, 1, 1, 1, 1], np.float32)),
]


def write(folder: Path, layout: Layout, sequences: list[TokenSequence] = SEQUENCES) -> np.ndarray:
    writer = Writer(folder, "train", layout)
    for sequence in sequences:
        writer.append(sequence)
    assert [p.name for p in writer.finish()] == ["data-00000.h5", "data_params.json"]
    with h5py.File(folder / "train" / "data-00000.h5") as file:
        assert list(file) == ["data"]
        assert file["data"].dtype == np.int32
        assert file.attrs["n_examples"] == len(file["data"])
        return file["data"][:]


def test_written_rows_are_the_model_zoos(tmp_path: Path) -> None:
    assert write(tmp_path, Layout(6, padding=PAD, vocab_size=10)).tolist() == PROMPTED
    values = json.loads((tmp_path / "train" / "data_params.json").read_text())
    assert {"setup", "processing", "dataset", "post-process", "h5_dataset_stats"} <= values.keys()
    assert values["post-process"]["n_examples"] == 2
    assert values["post-process"]["pad_id"] == PAD
    assert values["post-process"]["vocab_size"] == 10
    stats = values["h5_dataset_stats"]
    assert (stats["num_sequences"], stats["num_tokens"], stats["loss_valid_tokens"]) == (2, 12, 6)
    assert stats["non_pad_tokens"] == 10


def test_written_five_rows(tmp_path: Path) -> None:
    short = [TokenSequence(np.array([1, 2, 3])), TokenSequence(np.array([4])), *SEQUENCES]
    data = write(tmp_path, Layout(6, padding=PAD, packed=True), short)
    assert data[0].tolist() == [
        [1, 2, 4, 5, 6, 7],
        [1, 1, 0, 0, 1, 1],
        [2, 3, PAD, 6, 7, 8],
        [1, 0, 0, 2, 1, 0],
        [0, 1, 0, 0, 1, 2],
    ]
    assert read(tmp_path / "train" / "data-00000.h5")[2:] == PROMPTED_READ
    assert read(tmp_path / "train" / "data-00000.h5")[1] == ([4], [1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((2, 4, 6), np.int32), "not \\(rows, 3 or 5, length\\)"),
        (np.zeros((2, 3, 6), np.int64), "holds int64"),
        (np.full((2, 3, 6), 2, np.int32), "not 0 or 1"),
        (np.array([[[1, 2, 3], [1, 1, 1], [1, 2, 3]]], np.int32), "not its inputs shifted"),
        (np.ones((2, 5, 6), np.int32), "start at position 0"),
    ],
)
def test_other_layouts_are_refused(data: np.ndarray, message: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = data
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.h5")


def test_lying_counts_and_mixed_widths_are_refused(tmp_path: Path) -> None:
    by_hand(tmp_path / "a.h5", PROMPTED)
    by_hand(tmp_path / "b.h5", [[[1, 2], [1, 1], [2, 3]]])
    with pytest.raises(DataError, match="differ in shape"):
        read(tmp_path / "a.h5", tmp_path / "b.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["n_examples"] = 1 << 40
    with pytest.raises(DataError, match="n_examples says otherwise"):
        read(tmp_path / "a.h5")
