"""What `prepare` can read: a closed registry of source kinds.

A source lists files, cuts large ones into ranges, and reads a file or range as documents; each
range gives the same documents whichever process reads it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from penstock.config.data import SourceSection
from penstock.data.sources.files import SourceFile, list_files
from penstock.data.sources.generated import list_generated, read_generated
from penstock.data.sources.hub import list_hub, read_hub
from penstock.data.sources.piece import Piece, Tally
from penstock.data.sources.reading import cut_text, read_text
from penstock.data.sources.stdlib import list_stdlib
from penstock.data.sources.tables import cut_jsonl, cut_parquet, read_csv, read_jsonl, read_parquet
from penstock.data.sources.wikipedia import cut_dump, read_articles

_Cut = Callable[[SourceFile, SourceSection, int, Path | None], list[SourceFile]]


def _whole(
    file: SourceFile, section: SourceSection, size: int, folder: Path | None
) -> list[SourceFile]:
    return [file]


def _in_place(cut: Callable[[SourceFile, SourceSection, int], list[SourceFile]]) -> _Cut:
    """A way of cutting that needs no folder."""
    return lambda file, section, size, folder: cut(file, section, size)


@dataclasses.dataclass(frozen=True)
class Source:
    """One kind of source."""

    read: Callable[[SourceFile, SourceSection, Tally], Iterator[Piece]]
    """The documents of a file or range, in order."""
    files: Callable[[SourceSection], list[SourceFile]] = list_files
    """The files there are, in an order that does not change."""
    cut: _Cut = _whole
    """Ranges of about so many bytes, which together give the file's documents; the folder is to
    unpack into, where that must be: without one such a file stays whole."""
    records: bool = False
    """Whether documents may be prompts and completions or chats."""


SOURCES: dict[str, Source] = {
    "text": Source(read_text, cut=_in_place(cut_text)),
    "stdlib": Source(read_text, files=lambda section: list_stdlib(), cut=_in_place(cut_text)),
    "jsonl": Source(read_jsonl, cut=_in_place(cut_jsonl), records=True),
    "csv": Source(read_csv, records=True),
    "parquet": Source(read_parquet, cut=_in_place(cut_parquet), records=True),
    "wikipedia": Source(read_articles, cut=cut_dump),
    "hub": Source(read_hub, files=list_hub, records=True),
    "generated": Source(read_generated, files=lambda section: list_generated()),
}
"""By source.kind."""


def read_documents(
    file: SourceFile, section: SourceSection, tally: Tally | None = None
) -> Iterator[Piece]:
    """The documents of one file or range of any kind of source.

    Raises:
        DataError: what `source.on_error` does not pass over.
    """
    return SOURCES[section.kind].read(file, section, Tally() if tally is None else tally)
