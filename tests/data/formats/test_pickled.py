"""Pickles: what Python itself writes is read; whatever would run is refused before it does."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from penstock.data.formats.pickled import Reader, Writer, recognises
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.errors import DataError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
FLAT = [0, 255, 256, 65535, 65536, 2**31 - 1, *range(3000)]
SHARED = np.array([7, 8, 9], np.int64)


def lists(path: Path) -> list[list[int]]:
    return [s.tokens.tolist() for s in Reader(path).sequences()]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (FLAT, [FLAT]),
        ([FLAT, [1], []], [FLAT, [1], []]),
        ([], []),
        (np.arange(300, dtype=np.uint16), [list(range(300))]),
        (np.arange(6, dtype=np.int32).reshape(2, 3), [[0, 1, 2], [3, 4, 5]]),
        (np.asfortranarray(np.arange(6).reshape(2, 3)), [[0, 1, 2], [3, 4, 5]]),
        ([SHARED, SHARED.astype(">i4"), np.array([], np.uint8)], [[7, 8, 9], [7, 8, 9], []]),
        ([np.int64(3), np.int64(70000)], [[3, 70000]]),
    ],
)
def test_what_python_pickles_is_read(protocol: int, value, expected, tmp_path: Path) -> None:
    data = pickle.dumps(value, protocol)
    assert recognises(data[:64])
    (tmp_path / "x").write_bytes(data)
    assert lists(tmp_path / "x") == expected


@pytest.mark.parametrize("sequences", [[[1, 2, 70000]], [[1], [], [2**31 - 1]], []])
def test_python_reads_what_is_written(sequences: list[list[int]], tmp_path: Path) -> None:
    writer = Writer(tmp_path, "train", Layout(3, sequences=len(sequences)))
    for sequence in sequences:
        writer.append(TokenSequence(np.array(sequence, np.int64)))
    (path,) = writer.finish()
    loaded = pickle.loads(path.read_bytes())
    assert loaded == (sequences[0] if len(sequences) == 1 else sequences)
    assert lists(path) == sequences


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, function, *arguments) -> None:
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


def opened(mark: str):
    return Trap(open, mark, "w")


def imported(mark: str):
    import os

    return Trap(os.system, f"touch {mark}")


def evaluated(mark: str):
    return Trap(eval, f"open({mark!r}, 'w')")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("trap", [opened, imported, evaluated])
@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: [t], lambda t: [1, 2, t], lambda t: [[1], [t]]]
)
def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(
    protocol: int, trap, wrap, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "x").write_bytes(pickle.dumps(wrap(trap(str(mark))), protocol))
    with pytest.raises(DataError, match="which it would call"):
        Reader(tmp_path / "x")
    assert not mark.exists()


def test_the_name_that_would_be_called_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(DataError, match="os.system"):
        Reader(tmp_path / "x")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        {"stoi": {"a": 1}},
        [1.5],
        [True],
        ["text"],
        [[[1]]],
        [1, [2]],
        (1, 2),
        [None],
        {1, 2},
        2**70,
        [2**70],
        np.ones(3),
        np.array(["a"]),
        np.array([None]),
        np.ones((1, 1, 1), np.int32),
        [np.float32(1)],
        bytearray(b"x"),
    ],
    ids=repr,
)
def test_other_values_are_refused(protocol: int, value, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(DataError):
        Reader(tmp_path / "x")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04]\x8e" + b"\xff" * 8 + b".",
        b"\x80\x04\x95" + b"\xff" * 8 + b"].",
        b"\x80\x05\x96\x00\x00\x00\x00\xff\x00\x00\x00.",
        b"\x80\x02]X\xff\xff\xff\xff.",
        b"\x80\x02]T\xff\xff\xff\xff.",
        b"\x80\x02(((((",
        b"\x80\x02a.",
        b"\x80\x02].".replace(b".", b""),
        b"\x80\x02]r\xff\xff\xff\xffj\xfe\xff\xff\xff.",
        b"\x80\x06].",
        b"\x80\x02]I" + b"9" * 5000 + b"\na.",
        b"\x80\x02]q\x00h\x00a.",
        b"",
    ],
)
def test_lying_and_broken_pickles_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DataError):
        Reader(tmp_path / "x")


def test_lists_that_stand_in_for_many_are_refused(tmp_path: Path) -> None:
    inner = list(range(1000))
    (tmp_path / "x").write_bytes(pickle.dumps([inner] * 1000, 2))
    with pytest.raises(DataError, match="more tokens than it has bytes"):
        Reader(tmp_path / "x")


def test_a_million_tokens_are_read_within_seconds(tmp_path: Path) -> None:
    import time

    tokens = (np.arange(1_000_000) % 50257).tolist()
    (tmp_path / "x").write_bytes(pickle.dumps(tokens))
    started = time.monotonic()
    assert len(lists(tmp_path / "x")[0]) == 1_000_000
    assert time.monotonic() - started < 5
