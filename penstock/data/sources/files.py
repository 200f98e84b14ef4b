"""Which files a source has: the user's paths, folders and globs, each file with a stable id.

`data/prepare.py` lists them through `data/sources`. It must never open them.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from penstock.config.data import SourceSection
from penstock.errors import DataError

_MAGIC = re.compile(r"[*?\[]")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file, or a range of its uncompressed bytes."""

    id: str
    """Stable name: path relative to the source's root."""
    path: str
    size: int
    """Bytes on disk of the file or the range."""
    mtime_ns: int
    start: int = 0
    """First uncompressed byte."""
    end: int | None = None
    """One past the last uncompressed byte; None: to the end."""
    split: str | None = None
    """Split it belongs to; None: by the hash of each document's id."""
    continues: bool = False
    """Whether its last document goes on in the next range of the same file."""


def list_files(section: SourceSection) -> list[SourceFile]:
    """All files `source.path` names, sorted by id; hidden files in folders are left out.

    Ids are relative to the folder, or to the folder that several paths or a glob have in common,
    so that they do not depend on where the text lies. A file that is named twice counts once.

    Raises:
        DataError: nothing there, or a folder that cannot be read.
    """
    if section.path is None:
        raise DataError(
            "no source was named", where="source.path", do="set source.path=FOLDER_OR_FILE"
        )
    items = [section.path] if isinstance(section.path, str) else section.path
    paths: set[Path] = set()
    for item in items:
        try:
            paths.update(_expand(item))
        except OSError as error:
            raise DataError(
                f"{error.filename or item} cannot be read: {error.strerror}",
                where="source.path",
                do="check the path and its permissions",
            ) from None
    if not paths:
        raise DataError(
            f"there are no files in {section.path}", where="source.path", do="check the path"
        )
    base = os.path.commonpath([_base(item) for item in items])
    return sorted((_described(path, base) for path in paths), key=lambda file: file.id)


def _described(path: Path, base: str) -> SourceFile:
    status = path.stat()
    name = path.relative_to(base).as_posix()
    return SourceFile(name, str(path), status.st_size, status.st_mtime_ns)


def _base(item: str) -> Path:
    """The folder itself, the one a file is in, or the one above a glob's first pattern."""
    root = _absolute(item)
    if root.exists():
        return root if root.is_dir() else root.parent
    while _MAGIC.search(str(root)):
        root = root.parent
    return root


def _absolute(item: str) -> Path:
    return Path(os.path.abspath(Path(item).expanduser()))


def _expand(item: str) -> Iterator[Path]:
    """Each file that a path, folder or glob names; a glob's folders with all that is in them."""
    root = _absolute(item)
    matches = [root] if root.exists() else sorted(map(Path, glob.glob(str(root), recursive=True)))
    if not matches:
        raise DataError(f"{item} does not exist", where="source.path", do="check the path")
    for path in matches:
        if path.is_dir():
            yield from _walk(path)
        elif path == root or path.is_file():
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, without hidden ones.

    Raises:
        OSError: a folder that cannot be read; leaving it out silently would lose text.
    """
    for top, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(top) / name
            if not name.startswith(".") and path.is_file():
                yield path


def _raise(error: OSError) -> None:
    raise error
