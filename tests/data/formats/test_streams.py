"""nanoGPT's and llm.c's streams, .npy arrays and JSON lines: bytes by hand, and damage."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from penstock.data.formats import jsonl, npy, raw
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.errors import DataError

SEQUENCES = [TokenSequence(np.array([1, 2, 3])), TokenSequence(np.array([50256, 0]))]
LAYOUT = Layout(3, sequences=2, tokens=5, largest=50256)


def write(kind, folder: Path, sequences=SEQUENCES, layout: Layout = LAYOUT) -> Path:
    writer = kind(folder, "train", layout)
    for sequence in sequences:
        writer.append(sequence)
    (path,) = writer.finish()
    assert [p.name for p in folder.iterdir()] == [path.name]
    return path


def lists(reader) -> list[list[int]]:
    return [s.tokens.tolist() for s in reader.sequences()]


def test_nanogpts_file_is_bare_uint16(tmp_path: Path) -> None:
    path = write(raw.BareWriter, tmp_path)
    assert path.name == "train.bin"
    assert path.read_bytes() == struct.pack("<5H", 1, 2, 3, 50256, 0)
    assert lists(raw.BareReader(path)) == [[1, 2, 3, 50256, 0]]
    assert "nothing in the file says" in raw.BareReader(path).facts.notes[0]


def test_llmcs_file_has_its_header(tmp_path: Path) -> None:
    path = write(raw.LlmcWriter, tmp_path)
    header = struct.pack("<3i", 20240520, 1, 5) + bytes(4 * 253)
    assert path.read_bytes() == header + struct.pack("<5H", 1, 2, 3, 50256, 0)
    assert lists(raw.LlmcReader(path)) == [[1, 2, 3, 50256, 0]]


def test_llmcs_file_of_a_large_vocabulary_is_uint32(tmp_path: Path) -> None:
    wide = [TokenSequence(np.array([128000]))]
    path = write(raw.LlmcWriter, tmp_path, wide, Layout(1, sequences=1, tokens=1, largest=128000))
    assert path.read_bytes()[:12] == struct.pack("<3i", 20240801, 7, 1)
    assert path.read_bytes()[1024:] == struct.pack("<I", 128000)
    assert lists(raw.LlmcReader(path)) == [[128000]]


@pytest.mark.parametrize("count", [4, 6, -1, 2**31 - 1])
def test_llmcs_header_must_agree_with_the_file(count: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<256i", 20240520, 1, count, *[0] * 253) + bytes(10))
    with pytest.raises(DataError, match="its header claims"):
        raw.LlmcReader(tmp_path / "x")


@pytest.mark.parametrize(
    ("data", "is_bare"),
    [
        (struct.pack("<300H", *range(0, 50100, 167)), True),
        (b"To be, or not to be: that is the question.", False),
        ("Ωμέγα, naïve – 日本語 text.".encode() * 7, False),
        (b"\x01\x02\x03", False),
        (b"", False),
        (np.random.default_rng(0).bytes(400), False),
        (struct.pack("<9H", *[50304] * 9), False),
    ],
)
def test_only_plausible_bytes_are_taken_for_a_bare_stream(
    data: bytes, is_bare: bool, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(data)
    assert raw.may_be_bare(tmp_path / "x") is is_bare


def test_text_of_any_length_is_no_stream(tmp_path: Path, test_data: Path) -> None:
    assert not raw.may_be_bare(test_data / "tinyshakespeare" / "input.txt")


def test_npy_is_numpys(tmp_path: Path) -> None:
    path = write(npy.Writer, tmp_path)
    assert np.load(path).dtype == np.uint16
    assert np.load(path).tolist() == [1, 2, 3, 50256, 0]
    rows = [TokenSequence(np.array([1, 70000])), TokenSequence(np.array([3, 4]))]
    layout = Layout(2, sequences=2, tokens=4, equal=True, largest=70000)
    path = write(npy.Writer, tmp_path, rows, layout)
    assert np.load(path).dtype == np.int32
    assert np.load(path).tolist() == [[1, 70000], [3, 4]]
    assert lists(npy.Reader(path)) == [[1, 70000], [3, 4]]
    np.save(tmp_path / "z.npy", np.arange(5, dtype=np.int64))
    assert lists(npy.Reader(tmp_path / "z.npy")) == [[0, 1, 2, 3, 4]]


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(3), "holds float64"),
        (np.ones((1, 1, 1), np.int32), "has shape"),
        (np.asfortranarray(np.ones((2, 3), np.int32)), "C order"),
        (np.ones((2, 0), np.int32), "rows without elements"),
        (np.array(1), "has shape"),
        (np.zeros(2, [("a", "i4")]), "no token ids"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(saved(array))
    with pytest.raises(DataError, match=message):
        npy.Reader(tmp_path / "x")


def test_an_array_of_objects_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "x").write_bytes(saved(np.array([Trap(mark)], object)))
    with pytest.raises(DataError, match="no token ids"):
        npy.Reader(tmp_path / "x")
    assert not mark.exists()


def test_a_lying_npy_header_is_refused(tmp_path: Path) -> None:
    data = saved(np.arange(5, dtype=np.int64)).replace(b"(5,)", b"(9,)")
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DataError, match="its header claims an array"):
        npy.Reader(tmp_path / "x")


def test_json_lines_are_plain_json(tmp_path: Path) -> None:
    weighted = TokenSequence(
        np.array([7, 8]), np.array([0, 0.5], np.float32), np.array([0, 1], np.uint8)
    )
    path = write(jsonl.Writer, tmp_path, [*SEQUENCES, weighted])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"input_ids": [1, 2, 3]},
        {"input_ids": [50256, 0]},
        {"input_ids": [7, 8], "loss_weights": [0, 0.5], "token_roles": [0, 1]},
    ]
    assert lists(jsonl.Reader(path)) == [[1, 2, 3], [50256, 0], [7, 8]]


@pytest.mark.parametrize(
    ("line", "tokens", "weights"),
    [
        ("[1, 2]", [1, 2], [1, 1]),
        ('{"tokens": [1, 2], "text": "x"}', [1, 2], [1, 1]),
        ('{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}', [1, 2], [1, 1]),
        ('{"input_ids": [1, 2, 0], "labels": [-100, 2, -100]}', [1, 2, 0], [0, 1, 0]),
        ('{"input_ids": [0, 1], "attention_mask": [0, 1], "labels": [-100, 1]}', [1], [1]),
        ('{"input_ids": [1], "token_type_ids": [0]}', [1], [1]),
    ],
)
def test_columns_as_tokenizers_leave_them(
    line: str, tokens: list[int], weights: list[float], tmp_path: Path
) -> None:
    (tmp_path / "x").write_text(line + "\n\n")
    (sequence,) = jsonl.Reader(tmp_path / "x").sequences()
    assert sequence.tokens.tolist() == tokens
    assert sequence.loss_weights().tolist() == weights


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1, 2.5]", "no list of numbers"),
        ("[1, true]", "no list of numbers"),
        ("[99999999999999999999]", "no list of numbers"),
        ('{"text": "x"}', "neither an array of token ids"),
        ('{"input_ids": [1], "loss_weights": [1, 1]}', "has 1 tokens but loss_weights"),
        ('{"input_ids": [1], "labels": [2]}', "labels that are not its input_ids"),
        ('{"input_ids": [1], "attention_mask": [2]}', "attention_mask that is not 0 or 1"),
        ('{"input_ids": [1], "token_roles": [9]}', "token_roles that are not"),
        ("[" * 100000, "not JSON"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "not JSON"),
    ],
)
def test_broken_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"[1]\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        list(jsonl.Reader(tmp_path / "x").sequences())
    assert f"{tmp_path / 'x'}:2" in str(caught.value)
