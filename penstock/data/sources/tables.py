"""Files of records: JSON lines, CSV with a header, Parquet.

`data/sources` offers them as kind=jsonl, csv and parquet. It must never know what a field means.
Sources: jsonlines.org; RFC 4180; Apache Parquet, through the process that reads risky formats.
"""

import codecs
import csv
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.config.data import SourceSection
from penstock.data.formats.isolation import IsolatedReader, parquet_groups
from penstock.data.sources.files import SourceFile
from penstock.data.sources.piece import Piece, Tally
from penstock.data.sources.reading import cut_at, utf8_bytes
from penstock.data.sources.records import Place, RecordError, pieces_of
from penstock.errors import DataError

_LONGEST_LINE = 64 << 20
"""Bytes; what is longer is no record but a file without line ends."""
_DEEPEST = 64
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BRACKET = re.compile(rb"[\[\]{}]")
_Records = Iterator[tuple[Place, Any]]


def cut_jsonl(file: SourceFile, section: SourceSection, size: int) -> list[SourceFile]:
    """Ranges of about `size` bytes between lines."""
    return cut_at(file, section, size, "line")


def read_jsonl(file: SourceFile, section: SourceSection, tally: Tally) -> Iterator[Piece]:
    """A document a line; empty lines are nothing.

    Raises:
        DataError: unreadable, or a broken line with on_error=stop.
    """
    return pieces_of(_json_records(file, section, tally), section, tally)


def _json_records(file: SourceFile, section: SourceSection, tally: Tally) -> _Records:
    for number, line in enumerate(_lines(file, section), 1):
        place = functools.partial(_line_place, file, section, number)
        if line is None:
            yield place, RecordError(f"is longer than {_LONGEST_LINE >> 20} MiB")
        elif line.strip():
            yield place, _parsed(line, section, tally)


def _parsed(line: bytes, section: SourceSection, tally: Tally) -> Any:  # noqa: ANN401 - any JSON value
    """The value of a line, or why it has none."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        if section.on_error != "replace":
            return RecordError(f"is not UTF-8 at byte {error.start} of its line")
        text = line.decode("utf-8", "replace")
        tally.add("records with bytes replaced")
    try:
        if line.count(b"[") + line.count(b"{") > _DEEPEST and _depth(line) > _DEEPEST:
            return RecordError(f"is nested more than {_DEEPEST} deep")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return RecordError(f"is no JSON ({error})")


def _depth(line: bytes) -> int:
    """How deep brackets are nested outside strings."""
    depth = deepest = 0
    for found in _BRACKET.finditer(_STRING.sub(b"", line)):
        depth += 1 if found.group() in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _lines(file: SourceFile, section: SourceSection) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is too long, of which nothing is kept."""
    rest = bytearray()
    too_long = False
    for chunk in utf8_bytes(file, section):
        *lines, last = chunk.split(b"\n")
        for line in lines:
            whole = bytes(rest) + line
            yield None if too_long or len(whole) > _LONGEST_LINE else whole
            rest.clear()
            too_long = False
        rest += last
        if len(rest) > _LONGEST_LINE:
            too_long = True
            rest.clear()
    if rest or too_long:
        yield None if too_long else bytes(rest)


def _line_place(file: SourceFile, section: SourceSection, number: int) -> str:
    """Where the range's line `number` is, counted in the file."""
    before = 0
    if file.start:
        head = dataclasses.replace(file, start=0, end=file.start)
        before = sum(chunk.count(b"\n") for chunk in utf8_bytes(head, section))
    return f"{file.path}, line {before + number}"


def read_csv(file: SourceFile, section: SourceSection, tally: Tally) -> Iterator[Piece]:
    """A document a row; the first row names the fields. Commas, or tabs where the header has any.

    Raises:
        DataError: unreadable, no header, or a broken row with on_error=stop.
    """
    return pieces_of(_csv_records(file, section, tally), section, tally)


def _csv_records(file: SourceFile, section: SourceSection, tally: Tally) -> _Records:
    csv.field_size_limit(_LONGEST_LINE)
    lines = _text_lines(file, section, tally)
    header = next(lines, "")
    mark = "\t" if "\t" in header and "," not in header else ","
    names = _header(file, header, mark)
    rows = csv.reader(lines, delimiter=mark, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            row = RecordError(f"is no CSV ({error})")
        if row is None:
            return
        place = functools.partial("{}, line {}".format, file.path, rows.line_num + 1)
        if isinstance(row, list) and len(row) != len(names):
            if not row:
                continue
            row = RecordError(f"has {len(row)} fields, the header has {len(names)}")
        yield place, dict(zip(names, row, strict=True)) if isinstance(row, list) else row


def _header(file: SourceFile, line: str, mark: str) -> list[str]:
    """The names of the fields."""
    try:
        return next(csv.reader([line], delimiter=mark), [])
    except csv.Error as error:
        raise DataError(
            f"the header of {file.path} is no CSV ({error})",
            where="source.path",
            do="mend its first line",
        ) from None


def _text_lines(file: SourceFile, section: SourceSection, tally: Tally) -> Iterator[str]:
    """Lines with their ends, as the csv module wants them.

    Raises:
        DataError: a line too long, or not of its encoding unless it may be replaced.
    """
    errors = "strict" if section.on_error == "stop" else "replace"
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    for number, line in enumerate(_lines(file, section), 1):
        if line is None:
            raise DataError(
                f"{file.path} has a line of more than {_LONGEST_LINE >> 20} MiB",
                where=f"line {number}",
                do="mend the file",
            )
        try:
            text = decoder.decode(line, final=True)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.path} is not UTF-8 at byte {error.start} of line {number}",
                where="source.path",
                do="set source.encoding, or source.on_error=replace",
            ) from None
        if errors == "replace" and "\ufffd" in text:
            tally.add("records with bytes replaced")
        yield text + "\n"


def cut_parquet(file: SourceFile, section: SourceSection, size: int) -> list[SourceFile]:
    """Runs of row groups of about `size` bytes; `start` and `end` count groups."""
    groups = parquet_groups(Path(file.path))
    parts: list[SourceFile] = []
    first = held = 0
    for number, group in enumerate(groups, 1):
        held += group
        if held >= size or number == len(groups):
            parts.append(dataclasses.replace(file, start=first, end=number, size=held))
            first, held = number, 0
    return parts


def read_parquet(file: SourceFile, section: SourceSection, tally: Tally) -> Iterator[Piece]:
    """A document a row.

    Raises:
        DataError: damaged, or a broken row with on_error=stop.
    """
    return pieces_of(_parquet_records(file, section), section, tally)


def _parquet_records(file: SourceFile, section: SourceSection) -> _Records:
    keys = (section.text_key, section.prompt_key, section.completion_key, section.messages_key)
    keys += () if section.category_key is None else (section.category_key,)
    reader = IsolatedReader(
        "records", [Path(file.path)], columns=list(keys), groups=[file.start, file.end]
    )
    for number, text in enumerate(reader.texts(), 1):
        place = functools.partial(
            "{}, row {} from row group {}".format, file.path, number, file.start
        )
        yield place, json.loads(text)
