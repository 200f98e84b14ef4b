"""Damaged input of every kind of source: only our own errors come out, and what is read encodes.

A few hundred inputs of each kind by default; `slow` brings all kinds together above 100,000.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from penstock.config.cleaning import CleanSection
from penstock.config.data import SourceSection
from penstock.data.chat import ChatTemplate
from penstock.data.encode import Encoder
from penstock.data.sources import SOURCES
from penstock.data.sources.piece import Tally
from penstock.data.tokenize import batches, split_pieces
from penstock.data.tokenizer import Tokenizer
from penstock.errors import UserError
from tests.data.formats.test_fuzz import little_memory, mutations
from tests.data.test_wikipedia import HEAD, MARKUP, PAGE

_ = little_memory  # a fixture, used by name
TEXT = "A line of words, naïve: 漢字 שלום 🙂\n\n  indented\tcode = 1\r\nlast line\n" * 3
PACKERS: list[Callable[[bytes], bytes]] = [
    gzip.compress,
    bz2.compress,
    lzma.compress,
    zstandard.compress,
]
PIECES = [
    "\0",
    "\ud800",
    "\\ud800",
    "\u202e",
    "\ufeff",
    "{{",
    "}}",
    "[[",
    "]]",
    "{|",
    "|}",
    "<ref>",
    "</ref>",
    "<page>",
    "</page>",
    "<text>",
    "</text>",
    "<!--",
    "<![CDATA[",
    "&lol;",
    "&#0;",
    "&#xD800;",
    "<!ENTITY a 'b'>",
    "<doc ",
    "</doc>",
    '"',
    "'",
    "\\",
    "[" * 80,
    "{" * 80,
    "null",
    "NaN",
    "1e999",
    "-1",
    '{"role": 1}',
    "\r",
    "\n\n",
    ",",
    "\t",
    "<|endoftext|>",
]
"""Fragments that mean something to one source or another."""
RECORDS = [
    {"text": "plain text 🙂\nline two"},
    {"prompt": "ask", "completion": "tell"},
    [{"prompt": "a", "completion": "b"}, {"completion": "c"}],
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
    {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
CHATS = [{"role": role, "content": "some words"} for role in ("system", "user", "assistant")]


def page(number: int, text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return PAGE.format(title=f"Page {number}", ns=0, id=number, redirect="", text=escaped)


def plain(rng: random.Random) -> bytes:
    return TEXT.encode()


def encoded(rng: random.Random) -> bytes:
    return TEXT.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-be", "gb18030"]))


def packed(rng: random.Random) -> bytes:
    return rng.choice(PACKERS)(TEXT.encode())


def records(rng: random.Random) -> bytes:
    return "\n".join(json.dumps(rng.choice(RECORDS)) for _ in range(4)).encode()


def chats(rng: random.Random) -> bytes:
    return "\n".join(json.dumps({"messages": CHATS}) for _ in range(3)).encode()


def rows(rng: random.Random) -> bytes:
    handle = io.StringIO()
    writer = csv.writer(handle, delimiter=rng.choice(",\t"))
    writer.writerow(["prompt", "completion"])
    writer.writerows([["ask, please", 'a "quoted"\nanswer'], ["x", "y"]])
    return handle.getvalue().encode()


def table(rng: random.Random) -> bytes:
    handle = io.BytesIO()
    values: list = [{"text": f"document {i}"} for i in range(6)]
    parquet.write_table(pa.Table.from_pylist(values), handle, row_group_size=2)
    return handle.getvalue()


def extracted(rng: random.Random) -> bytes:
    one = '<doc id="12" url="https://x" title="A &amp; B">\nA & B\n\nSome text.\n</doc>\n'
    return (one * 2).encode()


PAGES = 50


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, or a fragment put in that means something."""
    if rng.random() < 0.5:
        return next(mutations(data, rng))
    place = rng.randrange(len(data))
    piece = rng.choice(PIECES) * rng.choice((1, 1, 1, 3, 200))
    return data[:place] + piece.encode("utf-8", "surrogatepass") + data[place:]


def dumped(rng: random.Random) -> bytes:
    """A dump of which every page is damaged by itself."""
    pages = [damaged(page(n, MARKUP).encode(), rng) for n in range(PAGES)]
    return HEAD.encode() + b"".join(pages) + b"</mediawiki>\n"


KINDS: dict[str, tuple[str, str, Callable[[random.Random], bytes], int]] = {
    "text": ("text", "x.txt", plain, 25_000),
    "encodings": ("text", "x.txt", encoded, 15_000),
    "compressed": ("text", "x.gz", packed, 15_000),
    "records": ("jsonl", "x.jsonl", records, 20_000),
    "chats": ("jsonl", "x.jsonl", chats, 10_000),
    "csv": ("csv", "x.csv", rows, 10_000),
    "parquet": ("parquet", "x.parquet", table, 2_000),
    "extracted": ("wikipedia", "AA/wiki_00", extracted, 5_000),
    "dump": ("wikipedia", "x.xml", dumped, 100),
}
"""By name: kind of source, name of the file, its content, and how many the slow test makes."""


def settings_of(kind: str, path: Path, rng: random.Random) -> SourceSection:
    return SourceSection.model_validate(
        {
            "kind": kind,
            "path": str(path),
            "on_error": rng.choice(["stop", "skip", "replace"]),
            "documents": rng.choice([None, "file", "line", "blank_line"]),
            "encoding": rng.choice([None, None, None, "utf-8", "utf-16", "gb18030", "cp1252"]),
            "packing_boundary": rng.choice(["document", "pair"]),
            "page_seconds": 5,
        }
    )


def pass_through(section: SourceSection, tokenizer: Tokenizer, rng: random.Random) -> int:
    """List, cut, read, clean and encode as `prepare` does; the number of documents."""
    source = SOURCES[section.kind]
    cleaning = CleanSection(
        unicode=rng.choice([None, "nfc", "nfkc"]), max_digits=rng.choice([1.0, 0.5])
    )
    encoder = Encoder(tokenizer, section, ChatTemplate(TEMPLATE, {}))
    # Each range of a dump starts a process: few of them.
    size = rng.choice([1 << 14, 1 << 20] if section.kind == "wikipedia" else [16, 64, 1 << 20])
    parts = [
        part
        for file in source.files(section)
        for part in source.cut(file, section, size, Path(str(section.path)) / ".work")
    ]
    documents, tally = 0, Tally()
    for batch in batches(split_pieces(parts, section, (0.5, 0.5, 0), tally, cleaning)):
        encoded_pieces = encoder.encode([piece for _, piece in batch], tally)
        for (_, piece), sequences in zip(batch, encoded_pieces, strict=True):
            documents += piece.ends
            for sequence in sequences:
                assert not len(sequence.tokens) or sequence.tokens.max() < tokenizer.vocab_size
            assert piece.text.encode("utf-8", "strict") is not None
    return documents


def fuzz(name: str, folder: Path, tokenizer: Tokenizer, seed: int, inputs: int) -> dict[str, int]:
    """Damage input and read it; returns how many were read and how many refused."""
    kind, file, make, _ = KINDS[name]
    rng = random.Random(seed)
    path = folder / "in" / file
    path.parent.mkdir(parents=True)
    counts = {"read": 0, "refused": 0}
    for _ in range(inputs):
        data = make(rng)
        # Of a dump the pages are damaged already; one in four is damaged as a whole besides.
        content = data if name == "dump" and rng.random() < 0.75 else damaged(data, rng)
        path.write_bytes(content)
        try:
            pass_through(settings_of(kind, folder / "in", rng), tokenizer, rng)
            counts["read"] += 1
        except UserError:
            counts["refused"] += 1
    return counts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 20], 300)


@pytest.mark.parametrize("name", KINDS)
def test_damaged_sources_are_refused_or_read(
    name: str, tmp_path: Path, tokenizer: Tokenizer, little_memory: Callable[[], int]
) -> None:
    inputs = {"dump": 4, "parquet": 60}.get(name, 200)
    counts = fuzz(name, tmp_path, tokenizer, seed=1, inputs=inputs)
    assert counts["read"] > 0
    assert counts["refused"] > 0 or name in ("dump", "extracted")
    assert little_memory() < 256 << 20


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_hundred_thousand_damaged_sources(
    name: str, tokenizer: Tokenizer, little_memory: Callable[[], int]
) -> None:
    shared = Path("/dev/shm")
    inputs = KINDS[name][3]
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        counts = fuzz(name, Path(folder), tokenizer, seed=2, inputs=inputs)
    assert sum(counts.values()) == inputs
    assert little_memory() < 512 << 20


def test_the_slow_test_makes_a_hundred_thousand() -> None:
    made = {name: kind[3] for name, kind in KINDS.items()}
    assert sum(made.values()) + made["dump"] * (PAGES - 1) > 100_000


@pytest.mark.skipif(find_spec("datasets") is None, reason="the extra `hub` is not installed")
@pytest.mark.parametrize("inputs", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_hub_folders_are_refused_or_read(
    inputs: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rng = random.Random(4)
    for number in range(inputs):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        name, make = rng.choice([("train.jsonl", records), ("train.csv", rows), ("train.parquet", table)])  # fmt: skip
        (folder / name).write_bytes(damaged(make(rng), rng))
        if rng.random() < 0.3:
            card = b"---\nconfigs:\n- config_name: one\n  data_files: train.*\n---\n"
            (folder / "README.md").write_bytes(damaged(card, rng))
        try:
            pass_through(settings_of("hub", folder, rng), tokenizer, rng)
        except UserError:
            continue
