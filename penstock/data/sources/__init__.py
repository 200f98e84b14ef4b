"""What `prepare` can read: a closed registry of source kinds.

A source lists files, cuts large ones into ranges, and reads a file or range as documents; each
range gives the same documents whichever process reads it.
"""

import dataclasses
from collections.abc import Callable, Iterator

from penstock.config.data import SourceSection
from penstock.data.sources.files import SourceFile, list_files
from penstock.data.sources.piece import Piece, Tally
from penstock.data.sources.reading import cut_text, read_text
from penstock.data.sources.stdlib import list_stdlib
from penstock.data.sources.tables import cut_jsonl, cut_parquet, read_csv, read_jsonl, read_parquet


def _whole(file: SourceFile, section: SourceSection, size: int) -> list[SourceFile]:
    return [file]


@dataclasses.dataclass(frozen=True)
class Source:
    """One kind of source."""

    read: Callable[[SourceFile, SourceSection, Tally], Iterator[Piece]]
    """The documents of a file or range, in order."""
    files: Callable[[SourceSection], list[SourceFile]] = list_files
    """The files there are, in an order that does not change."""
    cut: Callable[[SourceFile, SourceSection, int], list[SourceFile]] = _whole
    """Ranges of about so many bytes, which together give the file's documents."""
    records: bool = False
    """Whether documents may be prompts and completions or chats."""


SOURCES: dict[str, Source] = {
    "text": Source(read_text, cut=cut_text),
    "stdlib": Source(read_text, files=lambda section: list_stdlib(), cut=cut_text),
    "jsonl": Source(read_jsonl, cut=cut_jsonl, records=True),
    "csv": Source(read_csv, records=True),
    "parquet": Source(read_parquet, cut=cut_parquet, records=True),
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
