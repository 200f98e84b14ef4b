"""Text of source files, plain or compressed, as documents in bounded memory.

`data/tokenize.py` and `data/prepare.py` read through it. It must never tokenize.
"""

import codecs
import dataclasses
import io
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from penstock.config.data import SourceSection
from penstock.data.sources.decompression import READ_BYTES, compression_of, file_bytes, unreadable
from penstock.data.sources.encodings import as_utf8, encoding_of
from penstock.data.sources.files import SourceFile
from penstock.data.sources.piece import Piece, Tally
from penstock.errors import DataError

_LONGEST_PIECE = 1 << 22
"""Characters; text without a single space or newline is cut there, wherever that is."""
_LINE_CUT = re.compile(r".*\S\n(?=\S)", re.DOTALL)
_SPACE_CUT = re.compile(r".*\S(?=[ \n\t])", re.DOTALL)
"""The last place where text may be cut with the same tokens on both sides: in GPT-2's
pre-tokenizer no word reaches from a printing character over white space, and a lone newline
between two printing characters is a word of its own."""
_FILE_CUT = {
    "file": re.compile(rb"[!-~]\r?\n(?=[!-~])"),
    "line": re.compile(rb"\n"),
    "blank_line": re.compile(rb"\n[ \t]*\r?\n(?=[!-~])"),
}
"""Where a file may be cut, by kind of document: the same for bytes, none of them above ASCII."""
_WINDOW, _OVERLAP = 1 << 24, 1 << 12
"""Bytes searched at a time for a place to cut, and bytes looked at twice, for what lies across."""
_LINE_END = re.compile("\n")
_BLANK_LINE = re.compile(r"\n(?:[ \t]*\n)+")
_BLANK_START = re.compile(r"\A(?:[ \t]*\n)+")
_BLANK_END = re.compile(r"(?:\n[ \t]*)+\Z")
_LONGEST_MARK = 4
"""Bytes of the longest byte-order mark."""


def read_text(file: SourceFile, section: SourceSection, tally: Tally) -> Iterator[Piece]:
    """The documents of one file, in pieces of about a megabyte; empty ones are left out.

    Raises:
        DataError: unreadable, binary, or not of its encoding with `on_error=stop` (names file and
            offset).
    """
    if section.on_error == "skip" and not _is_text(file, section):
        tally.add("files left out", file.path)
        return
    texts = _decoded(file, section, tally)
    if section.documents in (None, "file"):
        yield from _whole(file, texts)
    else:
        yield from _divided(texts, section.documents == "line", bool(section.keep_newlines))


def is_plain(file: SourceFile, section: SourceSection) -> bool:
    """Whether the file's bytes are those of its text in UTF-8, so that any range can be read."""
    if compression_of(file.path) is not None:
        return False
    try:
        with Path(file.path).open("rb") as handle:
            return encoding_of(handle.read(_LONGEST_MARK), section.encoding)[0] == "utf-8"
    except OSError as error:
        raise unreadable(file.path, error) from None


def utf8_size(file: SourceFile, section: SourceSection) -> int:
    """Bytes of a file's text, decompressed and in UTF-8."""
    if is_plain(file, section):
        return file.size
    return sum(len(chunk) for chunk in utf8_bytes(file, section))


def line_start_after(file: SourceFile, section: SourceSection, offset: int) -> int:
    """First byte after the next newline at or after byte `offset`; the size if there is none."""
    position = offset
    for chunk in utf8_bytes(dataclasses.replace(file, start=offset, end=None), section):
        found = chunk.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(chunk)
    return position


def cut_text(file: SourceFile, section: SourceSection, size: int) -> list[SourceFile]:
    """Ranges of about `size` bytes of a file, cut where documents and tokens stay the same.

    A file that is compressed or not in UTF-8 stays whole, and so does one of which
    `on_error=skip` may leave out all.
    """
    if section.on_error == "skip":
        return [file]
    return cut_at(file, section, size, section.documents or "file")


def cut_at(file: SourceFile, section: SourceSection, size: int, kind: str) -> list[SourceFile]:
    """Ranges of about `size` bytes; `kind` of document: file, line or blank_line."""
    if file.size <= size or not is_plain(file, section):
        return [file]
    stop = file.start + file.size
    with (
        Path(file.path).open("rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        bounds = [file.start]
        while stop - bounds[-1] > size:
            cut = _next_cut(content, kind, bounds[-1] + size, stop)
            if cut == stop:
                break
            bounds.append(cut)
    return [
        dataclasses.replace(
            file,
            start=start,
            end=end,
            size=end - start,
            continues=kind == "file" and end < stop,
        )
        for start, end in zip(bounds, [*bounds[1:], stop], strict=True)
    ]


def _next_cut(content: mmap.mmap, kind: str, start: int, stop: int) -> int:
    """First place from `start` where a file may be cut, or `stop`; searched window by window, so
    that the pages of a file with few such places are not all held at once.
    """
    while start < stop:
        end = min(stop, start + _WINDOW)
        found = _FILE_CUT[kind].search(content, start, end)
        if found is not None:
            return found.end()
        content.madvise(mmap.MADV_DONTNEED)
        start = stop if end == stop else end - _OVERLAP
    return stop


def _is_text(file: SourceFile, section: SourceSection) -> bool:
    """Whether the whole range is readable text without NUL bytes."""
    try:
        for _ in _decoded(file, section, Tally()):
            pass
    except DataError:
        return False
    return True


def _whole(file: SourceFile, texts: Iterator[str]) -> Iterator[Piece]:
    """One document, cut where the cut does not change its tokens."""
    rest, some = "", False
    for text in texts:
        rest += text
        cut = _cut(rest)
        if cut:
            yield Piece(file.id, rest[:cut], ends=False, begins=not some and file.start == 0)
            some = True
            rest = rest[cut:]
    if some or rest:
        begins = not some and file.start == 0
        yield Piece(file.id, rest, ends=not file.continues, begins=begins)


def _cut(text: str) -> int:
    """Where to cut a stretch of text; 0: not yet."""
    found = _LINE_CUT.match(text)
    if found is None and len(text) >= READ_BYTES:
        found = _SPACE_CUT.match(text)
    if found is not None:
        return found.end()
    return _LONGEST_PIECE if len(text) > _LONGEST_PIECE else 0


def _divided(texts: Iterator[str], by_line: bool, keep_newlines: bool) -> Iterator[Piece]:
    """Documents between newlines or blank lines, those of white space left out."""
    separator = _LINE_END if by_line else _BLANK_LINE
    end = "\n" if by_line and keep_newlines else ""
    rest = ""
    begun: str | None = None
    """Id of the document whose first pieces are out already."""
    for text in texts:
        *documents, rest = separator.split(rest + text)
        for document in documents:
            yield from _last_piece(document, begun, by_line, end)
            begun = None
        cut = _cut(rest) if len(rest) > _LONGEST_PIECE else 0
        if cut:
            first = rest[:cut] if begun is not None else _BLANK_START.sub("", rest[:cut])
            if first.strip() or begun is not None:
                name: str = first if begun is None else begun
                yield Piece(name, first, ends=False, begins=begun is None)
                begun = name
            rest = rest[cut:]
    yield from _last_piece(_BLANK_END.sub("", rest), begun, by_line, "")


def _last_piece(text: str, begun: str | None, by_line: bool, end: str) -> Iterator[Piece]:
    """The end of a document, or the whole of it."""
    if begun is not None:
        yield Piece(begun, text + end, ends=True, begins=False)
    elif text.strip():
        text = text if by_line else _BLANK_START.sub("", text)
        yield Piece(text, text + end, ends=True)


def _decoded(file: SourceFile, section: SourceSection, tally: Tally) -> Iterator[str]:
    """The file's text in chunks; line ends become newlines."""
    replaces = section.on_error == "replace"
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if replaces else "strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = file.start
    mended = False
    for chunk in utf8_bytes(file, section):
        nul = chunk.find(b"\0")
        if nul >= 0 and not replaces:
            raise DataError(
                f"{file.path} is a binary file (NUL at byte {offset + nul})",
                where="source.path",
                do="leave it out, or set source.on_error=replace or skip",
            )
        text = newlines.decode(_decode(decoder, chunk, offset, file))
        if replaces:
            text = text.replace("\0", "\ufffd")
            mended |= "\ufffd" in text
        yield text
        offset += len(chunk)
    yield newlines.decode(_decode(decoder, b"", offset, file, final=True), final=True)
    if mended:
        tally.add("files with bytes replaced", file.path)


def _decode(
    decoder: codecs.IncrementalDecoder,
    chunk: bytes,
    offset: int,
    file: SourceFile,
    *,
    final: bool = False,
) -> str:
    """Decode a chunk, turning an error into one line with the byte's place in the file."""
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path} is not UTF-8 at byte {offset - pending + error.start}",
            where="source.path",
            do="convert it, or set source.encoding, or source.on_error=replace or skip",
        ) from None


def utf8_bytes(file: SourceFile, section: SourceSection) -> Iterator[bytes]:
    """The text of the range in UTF-8, decompressed, without a byte-order mark, in chunks.

    Raises:
        DataError: unreadable, damaged, or not of its encoding; UTF-8 is not checked here.
    """
    if is_plain(file, section):
        length = None if file.end is None else file.end - file.start
        chunks = _range(file_bytes(file.path, file.start), 0, length)
        if file.start == 0:
            chunks = as_utf8(chunks, "utf-8", "strict", file.path)
        yield from chunks
    else:
        errors = "replace" if section.on_error == "replace" else "strict"
        chunks = as_utf8(file_bytes(file.path), section.encoding, errors, file.path)
        yield from _range(chunks, file.start, file.end)


def _range(chunks: Iterator[bytes], start: int, end: int | None) -> Iterator[bytes]:
    """What lies between two positions of a stream."""
    position = 0
    for chunk in chunks:
        first = max(0, start - position)
        last = len(chunk) if end is None else min(len(chunk), end - position)
        if last > first:
            yield chunk[first:last]
        position += len(chunk)
        if end is not None and position >= end:
            return
