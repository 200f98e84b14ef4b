"""What `prepare` can read: a closed registry of source kinds."""

from collections.abc import Callable

from penstock.config.data import SourceSection
from penstock.data.sources.files import SourceFile, list_files
from penstock.data.sources.stdlib import list_stdlib

SOURCES: dict[str, Callable[[SourceSection], list[SourceFile]]] = {
    "text": list_files,
    "stdlib": lambda section: list_stdlib(),
}
"""source.kind → function that lists its files."""
