"""Text files of the user's, plain or compressed, as documents in bounded memory.

`data/prepare.py` lists and reads them through `data/sources`. It must never tokenize.
"""

import codecs
import dataclasses
import glob
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from penstock.config.schema import SourceSection
from penstock.errors import DataError

_READ_BYTES = 1 << 20
_CUT = re.compile(r"\S\n(?=\S)")
"""Where text may be cut so that byte-level BPE gives the same tokens: GPT-2's pre-tokenizer makes
a lone newline between two printing characters a word of its own."""
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file, or a range of its uncompressed bytes."""

    id: str
    """Stable name: path relative to the source's root."""
    path: str
    size: int
    mtime_ns: int
    start: int = 0
    """First uncompressed byte."""
    end: int | None = None
    """One past the last uncompressed byte; None: to the end."""
    split: str | None = None
    """Split it belongs to; None: by the hash of each document's id."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document's text; long documents come in several."""

    document: str
    """Stable id of the document."""
    text: str
    ends: bool
    """Whether the document ends here."""


def list_files(section: SourceSection) -> list[SourceFile]:
    """All files `source.path` names, sorted by id; hidden files are left out.

    Raises:
        DataError: nothing there.
    """
    if section.path is None:
        raise DataError(
            "no source was named", where="source.path", do="set source.path=FOLDER_OR_FILE"
        )
    paths = [section.path] if isinstance(section.path, str) else section.path
    found: dict[str, SourceFile] = {}
    for item in paths:
        for name, path in _expand(item):
            status = path.stat()
            found[name] = SourceFile(name, str(path), status.st_size, status.st_mtime_ns)
    if not found:
        raise DataError(
            f"there are no files in {section.path}", where="source.path", do="check the path"
        )
    return [found[name] for name in sorted(found)]


def _expand(item: str) -> Iterator[tuple[str, Path]]:
    """(id, path) of each file that a path, folder or glob names."""
    root = Path(item).expanduser()
    if root.is_dir():
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                yield relative.as_posix(), path
    elif root.exists():
        yield root.name, root
    else:
        matches = sorted(glob.glob(str(root), recursive=True))
        if not matches:
            raise DataError(f"{item} does not exist", where="source.path", do="check the path")
        for match in matches:
            if Path(match).is_file():
                yield Path(match).as_posix(), Path(match)


def uncompressed_size(file: SourceFile) -> int:
    """Bytes of a file's text, decompressed."""
    return sum(len(chunk) for chunk in _bytes(file))


def line_start_after(file: SourceFile, offset: int) -> int:
    """First byte after the next newline at or after byte `offset`; the size if there is none."""
    position = offset
    for chunk in _bytes(dataclasses.replace(file, start=offset, end=None)):
        found = chunk.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(chunk)
    return position


def read_pieces(file: SourceFile, section: SourceSection) -> Iterator[Piece]:
    """The documents of one file, in pieces of about a megabyte.

    Raises:
        DataError: unreadable, binary, or not UTF-8 with `on_error=stop` (names file and offset).
    """
    if section.on_error == "skip" and not _is_text(file):
        return
    texts = _decoded(file, "replace" if section.on_error == "replace" else "strict")
    if section.documents == "file":
        yield from _whole(file.id, texts)
    else:
        yield from _divided(file.id, texts, section.documents)


def _whole(name: str, texts: Iterator[str]) -> Iterator[Piece]:
    """One document, cut where the cut does not change its tokens."""
    rest = ""
    for text in texts:
        rest += text
        cut = max((found.end() for found in _CUT.finditer(rest)), default=0)
        if cut:
            yield Piece(name, rest[:cut], ends=False)
            rest = rest[cut:]
    yield Piece(name, rest, ends=True)


def _divided(name: str, texts: Iterator[str], kind: str) -> Iterator[Piece]:
    """Documents between newlines or blank lines, empty ones left out."""
    separator = re.compile("\n") if kind == "line" else _BLANK_LINE
    rest, number = "", 0
    for text in texts:
        *documents, rest = separator.split(rest + text)
        for document in documents:
            if document.strip():
                yield Piece(f"{name}:{number}", document, ends=True)
                number += 1
    if rest.strip():
        yield Piece(f"{name}:{number}", rest, ends=True)


def _is_text(file: SourceFile) -> bool:
    """Whether the whole range is readable UTF-8 without NUL bytes."""
    try:
        for _ in _decoded(file, "strict"):
            pass
    except DataError:
        return False
    return True


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
        with _open(file.path) as handle:
            handle.seek(file.start)
            left = None if file.end is None else file.end - file.start
            while left is None or left > 0:
                chunk = handle.read(_READ_BYTES if left is None else min(left, _READ_BYTES))
                if not chunk:
                    break
                if left is not None:
                    left -= len(chunk)
                yield chunk
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            f"{file.path} cannot be read: {reason}", where="source.path", do="check the file"
        ) from None


def _open(path: str) -> IO[bytes]:
    """Open plain, gzip or Zstandard by the first bytes, never by the name."""
    handle = Path(path).open("rb")  # noqa: SIM115 - closed by the caller's with
    magic = handle.read(4)
    handle.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(handle)  # type: ignore[return-value]
    if magic == b"\x28\xb5\x2f\xfd":
        return zstandard.ZstdDecompressor().stream_reader(
            handle, read_across_frames=True, closefd=True
        )  # type: ignore[return-value]
    return handle
