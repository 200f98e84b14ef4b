"""Megatron files: exact layout, round trips, damage of every kind."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.cli import main
from penstock.data.formats.megatron import Reader, Writer, token_dtype
from penstock.errors import DataError


def write(prefix: Path, sequences: list[list[int]], dtype: type = np.uint16) -> None:
    with Writer(prefix, np.dtype(dtype)) as writer:
        for sequence in sequences:
            writer.append(np.array(sequence, dtype))


def test_the_layout_is_megatrons_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4]])
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 3, 1) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "x.idx").read_bytes() == expected
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.lists(st.integers(0, 60000), max_size=20), max_size=12))
def test_round_trip(tmp_path: Path, sequences: list[list[int]]) -> None:
    write(tmp_path / "x", sequences)
    reader = Reader(tmp_path / "x")
    read = [
        reader.tokens[a : a + n].tolist()
        for a, n in zip(reader.starts, reader.lengths, strict=True)
    ]
    assert read == sequences


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), keep=st.integers(0, 10**6))
def test_any_damaged_index_is_refused_or_harmless(
    tmp_path: Path, place: int, value: int, keep: int
) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5], [6]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    index[place % len(index)] = value
    (tmp_path / "x.idx").write_bytes(bytes(index)[: keep if keep < len(index) else None])
    try:
        reader = Reader(tmp_path / "x")
    except DataError:
        return
    assert reader.starts.min() >= 0
    assert (reader.starts + reader.lengths).max() <= len(reader.tokens)


@pytest.mark.parametrize(
    ("pointers", "message"),
    [
        ((0, -6, 6), "points outside the .bin"),
        ((0, 10, 10), "points outside the .bin"),
        ((0, 2**63 - 2, 10), "points outside the .bin"),
        ((0, 5, 10), "points between elements"),
        ((0, 4, 10), "has sequences that lie over one another"),
        ((0, 0, 10), "has sequences that lie over one another"),
        ((6, 4, 0), "has sequences that lie over one another"),
    ],
)
def test_negative_and_overlapping_pointers_are_refused(
    pointers: tuple[int, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5], [6]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    struct.pack_into("<3q", index, 34 + 12, *pointers)
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(DataError, match=message) as raised:
        Reader(tmp_path / "x")
    assert "\n" not in str(raised.value)
    assert main(["inspect", str(tmp_path / "x.idx")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_pointers_in_another_order_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5], [], [6]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    struct.pack_into("<4q", index, 34 + 16, 6, 2, 2, 0)
    (tmp_path / "x.idx").write_bytes(index)
    reader = Reader(tmp_path / "x")
    parts = zip(reader.starts, reader.lengths, strict=True)
    assert [reader.tokens[a : a + n].tolist() for a, n in parts] == [[4, 5, 6], [2, 3], [], [1]]


def test_dtype_follows_the_vocabulary() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_a_truncated_bin_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3]])
    (tmp_path / "x.bin").write_bytes(b"\0" * 4)
    with pytest.raises(DataError, match="its index accounts for 6"):
        Reader(tmp_path / "x")
