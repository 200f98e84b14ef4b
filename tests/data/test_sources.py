"""Sources: compressed and encoded text, records of every kind, and what is broken in them."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from penstock.config.data import SourceSection
from penstock.data.sources import SOURCES, read_documents
from penstock.data.sources.decompression import file_bytes
from penstock.data.sources.piece import Piece, Tally
from penstock.errors import ConfigError, DataError

TEXT = "".join(f"naïve words, number {i}: 漢字 שלום 🙂\n" for i in range(2000))


def read(
    path: Path, tally: Tally | None = None, size: int = 1 << 30, **keys: object
) -> list[Piece]:
    section = SourceSection(path=str(path), **keys)
    source = SOURCES[section.kind]
    parts = [
        part
        for file in source.files(section)
        for part in source.cut(file, section, size, path.parent)
    ]
    return [piece for part in parts for piece in read_documents(part, section, tally)]


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_compressed_files_give_the_text_of_plain_ones(pack: object, tmp_path: Path) -> None:
    content = TEXT.encode()
    half = len(content) // 2
    (tmp_path / "one").write_bytes(pack(content))
    assert text(read(tmp_path / "one")) == TEXT
    # Several streams one after another, as parallel compressors leave them.
    (tmp_path / "two").write_bytes(pack(content[:half]) + pack(content[half:]))
    assert text(read(tmp_path / "two")) == TEXT
    for kept in (7, len(pack(content)) // 2, -1):
        (tmp_path / "cut").write_bytes(pack(content)[:kept])
        with pytest.raises(DataError, match="cannot be read|NUL|not UTF-8"):
            read(tmp_path / "cut")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_a_decompression_bomb_is_refused(pack: object, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(pack(b"a" * (16 << 20)) * 5)
    with pytest.raises(DataError, match="unpacks to more than 64 MiB"):
        for _ in file_bytes(str(tmp_path / "bomb")):
            pass


@pytest.mark.parametrize(
    ("encoding", "key"),
    [
        ("utf-8-sig", None),
        ("utf-16", None),
        ("utf-32", None),
        ("utf-16-be", "utf-16-be"),
        ("utf-16", "utf-16"),
        ("gb18030", "gb18030"),
    ],
)
def test_every_encoding_gives_the_same_text(encoding: str, key: str | None, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(TEXT.encode(encoding))
    assert text(read(tmp_path / "x", encoding=key)) == TEXT
    (tmp_path / "x.gz").write_bytes(gzip.compress(TEXT.encode(encoding)))
    assert text(read(tmp_path / "x.gz", encoding=key)) == TEXT
    lines = read(tmp_path / "x", encoding=key, documents="line")
    assert [piece.text for piece in lines] == TEXT.splitlines()


def test_bytes_that_are_not_of_the_encoding(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("good \ud800 bad".encode("utf-16-le", "surrogatepass"))
    with pytest.raises(DataError, match="not utf-16-le at byte 10"):
        read(tmp_path / "x", encoding="utf-16-le")
    replaced = read(tmp_path / "x", encoding="utf-16-le", on_error="replace")
    assert "\ufffd" in text(replaced)
    (tmp_path / "nul").write_bytes(b"one\0two")
    with pytest.raises(DataError, match="NUL at byte 3"):
        read(tmp_path / "nul")
    tally = Tally()
    assert text(read(tmp_path / "nul", tally, on_error="replace")) == "one\ufffdtwo"
    assert tally.counts == {"files with bytes replaced": 1}
    with pytest.raises(ConfigError, match="no text encoding"):
        read(tmp_path / "nul", encoding="zip")


RECORDS = [
    {"text": "plain text 🙂"},
    {"prompt": "ask", "completion": "tell"},
    [{"prompt": "a", "completion": "b"}, {"completion": "c"}],
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
    {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
]


def test_records_are_texts_pairs_or_chats(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS))
    plain, pair, pairs, chat, other = read(tmp_path / "x.jsonl", kind="jsonl")
    assert (plain.text, plain.pairs, plain.messages) == ("plain text 🙂", (), ())
    assert pair.pairs == (("ask", "tell"),)
    assert pairs.pairs == (("a", "b"), ("", "c"))
    assert chat.messages == other.messages == tuple(RECORDS[3]["messages"])
    (renamed,) = read(tmp_path / "x.jsonl", kind="jsonl", completion_key="prompt", on_error="skip")[
        1:2
    ]
    assert renamed.pairs == (("ask", "ask"),)


def test_lines_cut_over_shards_are_read_once(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i} " * (i % 30 + 1)}) for i in range(500)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    whole = read(tmp_path / "x.jsonl", kind="jsonl")
    assert len(whole) == 500
    assert read(tmp_path / "x.jsonl", kind="jsonl", size=1000) == whole


BROKEN = [
    b'{"text": "one"}',
    b"{broken",
    b'{"text": "two"}',
    b"",
    b'{"other": 1}',
    b'{"text": 5}',
    b'{"text": "half \\ud800 pair"}',
    b'{"text": "not utf-8 \xff"}',
    b'{"text": ""}',
    b"[" * 5000,
    b'{"text": "three"}',
]


def test_broken_lines_are_named_left_out_or_mended(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(BROKEN))
    with pytest.raises(DataError, match="no JSON.*line 2"):
        read(tmp_path / "x.jsonl", kind="jsonl")
    tally = Tally()
    pieces = read(tmp_path / "x.jsonl", tally, kind="jsonl", on_error="skip")
    assert [piece.text for piece in pieces] == ["one", "two", "three"]
    assert tally.counts == {"broken records left out": 6, "records without text": 1}
    assert "line 5: has none of the fields text" in tally.places[1]
    tally = Tally()
    mended = read(tmp_path / "x.jsonl", tally, kind="jsonl", on_error="replace")
    assert [piece.text for piece in mended][2:4] == ["half \ufffd pair", "not utf-8 \ufffd"]
    assert tally.counts["broken records left out"] == 4


def test_a_broken_line_of_a_later_range_is_named_by_its_line_in_the_file(tmp_path: Path) -> None:
    lines = ['{"text": "good"}'] * 300 + ["bad"] + ['{"text": "good"}'] * 10
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 301"):
        read(tmp_path / "x.jsonl", kind="jsonl", size=500)


def test_tables_give_the_records_of_json(tmp_path: Path) -> None:
    rows = [{"prompt": f'say "{i}",\nplease', "completion": f"{i}\tè"} for i in range(700)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with (tmp_path / "x.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=100)
    expected = read(tmp_path / "x.jsonl", kind="jsonl")
    assert read(tmp_path / "x.csv", kind="csv") == expected
    assert read(tmp_path / "x.parquet", kind="parquet") == expected
    assert read(tmp_path / "x.parquet", kind="parquet", size=1) == expected
    section = SourceSection(path=str(tmp_path / "x.parquet"), kind="parquet")
    (file,) = SOURCES["parquet"].files(section)
    assert len(SOURCES["parquet"].cut(file, section, 1, tmp_path)) == 7


def test_broken_tables_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text,other\none,1\ntwo\n"three')
    with pytest.raises(DataError, match="has 1 fields, the header has 2.*line 3"):
        read(tmp_path / "x.csv", kind="csv")
    tally = Tally()
    pieces = read(tmp_path / "x.csv", tally, kind="csv", on_error="skip")
    assert [piece.text for piece in pieces] == ["one"]
    assert tally.counts == {"broken records left out": 2}
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="does not read"):
        read(tmp_path / "x.parquet", kind="parquet")
    parquet.write_table(pa.table({"number": [1]}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"has only the columns number.*text_key"):
        read(tmp_path / "y.parquet", kind="parquet")


def test_chats_in_parquet_are_lists_of_messages(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist([RECORDS[3]]), tmp_path / "x.parquet")
    (piece,) = read(tmp_path / "x.parquet", kind="parquet")
    assert piece.messages == tuple(RECORDS[3]["messages"])


def test_generated_documents_are_the_same_everywhere_and_differ_from_each_other() -> None:
    section = SourceSection(kind="generated")
    files = SOURCES["generated"].files(section)
    found = [list(read_documents(file, section)) for file in files]
    assert found[:3] == [list(read_documents(file, section)) for file in files[:3]]
    assert all(len(pieces) == 1 and pieces[0].ends for pieces in found)
    texts = [pieces[0].text for pieces in found]
    assert len(set(texts)) == len(files)
    words = {word for text in texts for word in text.split(" ")}
    assert all(word.isascii() and word.islower() for word in words)
    assert sum(map(len, texts)) == pytest.approx(sum(file.size for file in files), rel=0.02)
