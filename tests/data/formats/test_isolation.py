"""The process that reads risky files: what it reads, how it dies, and what dies with it."""

import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from penstock.data.formats import isolation
from penstock.data.formats.frames import pack, read_message, unpack, write_message
from penstock.data.formats.isolation import IsolatedReader
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.errors import DataError


def write(folder: Path, count: int) -> Path:
    writer = FORMATS["parquet"].write(folder, "train", Layout(100))
    for number in range(count):
        writer.append(TokenSequence(np.full(100, number)))
    return writer.finish()[0]


def test_long_files_come_in_batches_and_in_order(tmp_path: Path) -> None:
    reader = IsolatedReader("table", [write(tmp_path, 9000)])
    assert [int(s.tokens[0]) for s in reader.sequences()] == list(range(9000))


def test_two_readers_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    first, second = (IsolatedReader("table", [write(tmp_path / n, 9000)]) for n in "ab")
    pairs = zip(first.sequences(), second.sequences(), strict=True)
    assert all(a.tokens[0] == b.tokens[0] for a, b in pairs)


def child_pid() -> int:
    process = isolation._child._process
    assert process is not None
    return process.pid


def test_a_file_that_ends_its_reader_is_an_error_and_the_next_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 9000)
    reader = IsolatedReader("table", [path])
    sequences = reader.sequences()
    next(sequences)
    os.kill(child_pid(), signal.SIGKILL)
    with pytest.raises(DataError, match="train.parquet"):
        list(sequences)
    assert len(list(IsolatedReader("table", [path]).sequences())) == 9000


def test_an_iterator_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    reader = IsolatedReader("table", [write(tmp_path, 9000)])
    for _ in range(3):
        sequences = reader.sequences()
        next(sequences)
        sequences.close()
    assert next(reader.sequences()).tokens[0] == 0


def test_the_reader_can_write_no_file_and_has_limited_memory(tmp_path: Path) -> None:
    IsolatedReader("table", [write(tmp_path, 1)])
    limits = Path(f"/proc/{child_pid()}/limits").read_text()
    rows = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert rows["Max file size"] == ["0", "0"]
    assert rows["Max data size"] == [str(4 << 30)] * 2


SEQUENCES = [
    TokenSequence(np.array([1, 2], np.int32)),
    TokenSequence(np.array([3], np.int32), np.array([0.5], np.float32)),
    TokenSequence(np.array([], np.int32)),
]


def message() -> bytes:
    stream = io.BytesIO()
    write_message(stream, {"x": 1}, pack(SEQUENCES))
    return stream.getvalue()


def test_messages_come_back() -> None:
    header, arrays = read_message(io.BytesIO(message()))
    assert header["x"] == 1
    for a, b in zip(unpack(arrays), SEQUENCES, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert (a.weights is None) == (b.weights is None)
        assert a.loss_weights().tolist() == b.loss_weights().tolist()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"{}\n",
        b"[1]\n",
        b"nonsense\n",
        message()[:-1],
        json.dumps({"arrays": [["a", "i8", 1 << 60]]}).encode() + b"\n",
        json.dumps({"arrays": [["a", "O8", 1]]}).encode() + b"\n" + bytes(8),
        json.dumps({"arrays": [["a", "i8", -1]]}).encode() + b"\n",
        b"x" * (2 << 20),
    ],
)
def test_nonsense_is_no_message(data: bytes) -> None:
    with pytest.raises(EOFError):
        read_message(io.BytesIO(data))


@pytest.mark.parametrize("lengths", [[5], [-1, 4], [2, 2]])
def test_arrays_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    arrays = {"lengths": np.array(lengths, np.int64), "tokens": np.array([1, 2, 3])}
    with pytest.raises(EOFError):
        unpack(arrays)
