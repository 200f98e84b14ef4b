"""Text of source files, plain or compressed, as documents in bounded memory.

`data/tokenize.py` and `data/prepare.py` read through it. It must never tokenize.
"""

import codecs
import dataclasses
import gzip
import io
import mmap
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from penstock.config.data import SourceSection
from penstock.data.sources.files import SourceFile
from penstock.errors import DataError

_READ_BYTES = 1 << 20
_ZSTD_READ_BYTES = 1 << 10
"""Compressed bytes at a time: 4 of them can stand for 128 KiB (RFC 8878, §3.1.1.2)."""
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
    "blank_line": re.compile(rb"[!-~]\r?\n\r?\n(?=[!-~])"),
}
"""Where a file may be cut, by kind of document: the same for bytes, none of them above ASCII."""
_BLANK_LINE = re.compile(r"\n(?:[ \t]*\n)+")
_BLANK_START = re.compile(r"\A(?:[ \t]*\n)+")
_BLANK_END = re.compile(r"(?:\n[ \t]*)+\Z")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document's text; long documents come in several."""

    document: str
    """Stable id: the file's for documents=file, else the (start of the) text itself, so that
    equal lines or paragraphs never lie in two splits."""
    text: str
    ends: bool
    """Whether the document ends here."""


def read_pieces(file: SourceFile, section: SourceSection) -> Iterator[Piece]:
    """The documents of one file, in pieces of about a megabyte; empty ones are left out.

    Raises:
        DataError: unreadable, binary, or not UTF-8 with `on_error=stop` (names file and offset).
    """
    if section.on_error == "skip" and not is_text(file):
        return
    texts = _decoded(file, "replace" if section.on_error == "replace" else "strict")
    if section.documents == "file":
        yield from _whole(file, texts)
    else:
        yield from _divided(texts, section.documents)


def is_compressed(file: SourceFile) -> bool:
    """Whether the file is gzip or Zstandard, by its first bytes."""
    try:
        with Path(file.path).open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise _unreadable(file, error) from None
    return magic[:2] == _GZIP or magic == _ZSTD


def uncompressed_size(file: SourceFile) -> int:
    """Bytes of a file's text, decompressed."""
    return sum(len(chunk) for chunk in _bytes(file)) if is_compressed(file) else file.size


def line_start_after(file: SourceFile, offset: int) -> int:
    """First byte after the next newline at or after byte `offset`; the size if there is none."""
    position = offset
    for chunk in _bytes(dataclasses.replace(file, start=offset, end=None)):
        found = chunk.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(chunk)
    return position


def cut_file(file: SourceFile, section: SourceSection, size: int) -> list[SourceFile]:
    """Ranges of about `size` bytes of a file, cut where documents and tokens stay the same.

    A compressed file stays whole, and so does one of which `on_error=skip` may leave out all.
    """
    if file.size <= size or section.on_error == "skip" or is_compressed(file):
        return [file]
    stop = file.start + file.size
    with (
        Path(file.path).open("rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        bounds = [file.start]
        while stop - bounds[-1] > size:
            found = _FILE_CUT[section.documents].search(content, bounds[-1] + size, stop)
            if found is None or found.end() == stop:
                break
            bounds.append(found.end())
    return [
        dataclasses.replace(
            file,
            start=start,
            end=end,
            size=end - start,
            continues=section.documents == "file" and end < stop,
        )
        for start, end in zip(bounds, [*bounds[1:], stop], strict=True)
    ]


def is_text(file: SourceFile) -> bool:
    """Whether the whole range is readable UTF-8 without NUL bytes."""
    try:
        for _ in _decoded(file, "strict"):
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
            some = True
            yield Piece(file.id, rest[:cut], ends=False)
            rest = rest[cut:]
    if some or rest:
        yield Piece(file.id, rest, ends=not file.continues)


def _cut(text: str) -> int:
    """Where to cut a stretch of text; 0: not yet."""
    found = _LINE_CUT.match(text)
    if found is None and len(text) >= _READ_BYTES:
        found = _SPACE_CUT.match(text)
    if found is not None:
        return found.end()
    return _LONGEST_PIECE if len(text) > _LONGEST_PIECE else 0


def _divided(texts: Iterator[str], kind: str) -> Iterator[Piece]:
    """Documents between newlines or blank lines, those of white space left out."""
    separator = re.compile("\n") if kind == "line" else _BLANK_LINE
    rest = ""
    begun: str | None = None
    """Id of the document whose first pieces are out already."""
    for text in texts:
        *documents, rest = separator.split(rest + text)
        for document in documents:
            yield from _last_piece(document, begun, kind)
            begun = None
        cut = _cut(rest) if len(rest) > _LONGEST_PIECE else 0
        if cut:
            first = rest[:cut] if begun is not None else _BLANK_START.sub("", rest[:cut])
            if first.strip() or begun is not None:
                name: str = first if begun is None else begun
                yield Piece(name, first, ends=False)
                begun = name
            rest = rest[cut:]
    yield from _last_piece(_BLANK_END.sub("", rest), begun, kind)


def _last_piece(text: str, begun: str | None, kind: str) -> Iterator[Piece]:
    """The end of a document, or the whole of it."""
    if begun is not None:
        yield Piece(begun, text, ends=True)
    elif text.strip():
        text = text if kind == "line" else _BLANK_START.sub("", text)
        yield Piece(text, text, ends=True)


def _decoded(file: SourceFile, errors: str) -> Iterator[str]:
    """The file's text in chunks; line ends become newlines."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = file.start
    for chunk in _bytes(file):
        nul = chunk.find(b"\0")
        if nul >= 0:
            raise DataError(
                f"{file.path} is a binary file (NUL at byte {offset + nul})",
                where="source.path",
                do="leave it out, or set source.on_error=skip",
            )
        yield newlines.decode(_decode(decoder, chunk, offset, file))
        offset += len(chunk)
    yield newlines.decode(_decode(decoder, b"", offset, file, final=True), final=True)


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
            do="convert it, or set source.on_error=replace or skip",
        ) from None


def _bytes(file: SourceFile) -> Iterator[bytes]:
    """The uncompressed bytes of the range, in chunks."""
    try:
        with Path(file.path).open("rb") as handle:
            magic = handle.read(4)
            handle.seek(0)
            if magic[:2] == _GZIP:
                with gzip.open(handle) as plain:
                    yield from _range(_chunks(plain), file.start, file.end)  # type: ignore[arg-type]
            elif magic == _ZSTD:
                yield from _range(_zstd_chunks(handle), file.start, file.end)
            else:
                handle.seek(file.start)
                end = None if file.end is None else file.end - file.start
                yield from _range(_chunks(handle), 0, end)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise _unreadable(file, error) from None


def _chunks(handle: IO[bytes]) -> Iterator[bytes]:
    while chunk := handle.read(_READ_BYTES):
        yield chunk


def _zstd_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    """Frames one after another; unlike the library's stream reader it notices a missing end."""
    decoder: zstandard.ZstdDecompressionObj | None = None
    plain = bytearray()
    data = handle.read(_ZSTD_READ_BYTES)
    while data:
        if decoder is None:
            decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        plain += decoder.decompress(data)
        data = b""
        if decoder.eof:
            data, decoder = decoder.unused_data, None
        data = data or handle.read(_ZSTD_READ_BYTES)
        if len(plain) >= _READ_BYTES:
            yield bytes(plain)
            plain.clear()
    if decoder is not None:
        raise EOFError("compressed file ends before its end was marked")
    yield bytes(plain)


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


def _unreadable(file: SourceFile, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(
        f"{file.path} cannot be read: {reason}", where="source.path", do="check the file"
    )
