"""Data sets of Hugging Face's `datasets`: by name where there is a network, or local folders.

`data/sources` offers them as kind=hub. They are streamed: nothing is copied into a cache first.
Code that a data set brings along is never run. It must never know what a field means.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.config.data import SourceSection
from penstock.data.sources.files import SourceFile
from penstock.data.sources.piece import Piece, Tally
from penstock.data.sources.records import Place, pieces_of
from penstock.errors import ConfigError, DataError

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
"""Names data sets give their splits; documents of any other are shared out by `data.splits`."""
_GUESSED_BYTES = 16 << 20
"""Bytes a part counts for where nothing tells its size: one unit of work."""
_SAVED = ("dataset_dict.json", "state.json")
"""What a folder of `save_to_disk` has."""


def list_hub(section: SourceSection) -> list[SourceFile]:
    """Every part of every split, as the data set itself is cut.

    Where a data set has a train split alone, its documents are shared out by `data.splits`.

    Raises:
        ConfigError: the extra is not installed, or the configuration must be named.
        DataError: there is no such data set, or it does not read.
    """
    if not isinstance(section.path, str):
        raise ConfigError("no data set was named", where="source.path", do="set source.path=NAME")
    state = _folder_state(section.path)
    found = _load(section.path, section.name, state)
    files: list[SourceFile] = []
    for split in sorted(found):
        parts = int(found[split].num_shards)
        own = _SPLITS.get(split) if len(found) > 1 else None
        for part in range(parts):
            name = f"{split}/{part:05}-of-{parts:05}"
            files.append(SourceFile(name, section.path, _GUESSED_BYTES, state, part, part + 1, own))
    return files


def read_hub(file: SourceFile, section: SourceSection, tally: Tally) -> Iterator[Piece]:
    """A document a row of one part.

    Raises:
        DataError: damaged, or a broken row with on_error=stop.
    """
    return pieces_of(_records(file, section), section, tally)


def _records(file: SourceFile, section: SourceSection) -> Iterator[tuple[Place, Any]]:
    split = file.id.partition("/")[0]
    found = _load(file.path, section.name, file.mtime_ns)[split]
    part = found.shard(num_shards=int(found.num_shards), index=file.start, contiguous=True)
    rows = iter(part)
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # whatever a format's library raises
            raise _unreadable(file.path, error) from None
        if row is None:
            return
        number += 1
        yield functools.partial("{}, {}, row {}".format, file.path, file.id, number), row


@functools.lru_cache(maxsize=2)
def _load(path: str, name: str | None, state: int) -> dict[str, Any]:
    """The data set's splits, to be streamed; `state` tells a folder that has changed apart."""
    try:
        import datasets  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError(
            "reading data sets of the hub needs `datasets`",
            where="source.kind=hub",
            do="pip install 'penstock[hub]'",
        ) from None
    try:
        if any((Path(path) / one).is_file() for one in _SAVED):
            saved = datasets.load_from_disk(path)
            splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return {str(split): _streamed(one) for split, one in splits.items()}
        streams = datasets.load_dataset(path, name, streaming=True)
        return {str(split): one for split, one in streams.items()}
    except Exception as error:  # whatever the library and its formats raise
        raise _unreadable(path, error) from None


def _streamed(saved: Any) -> Any:  # noqa: ANN401 - the extra's type
    """A saved split as a stream, in as many parts as it has files."""
    return saved.to_iterable_dataset(num_shards=max(1, min(len(saved), len(saved.cache_files))))


def _folder_state(path: str) -> int:
    """The latest change in a local folder, in nanoseconds; 0 for a name on the hub."""
    folder = Path(path)
    if not folder.exists():
        return 0
    return max((file.stat().st_mtime_ns for file in [folder, *folder.rglob("*")]), default=0)


def _unreadable(path: str, error: Exception) -> DataError:
    first = " ".join(str(error).split())[:200]
    return DataError(
        f"the data set {path} cannot be read ({type(error).__name__}: {first})",
        where="source.path",
        do="check the name, source.name, and the network; or give a local folder",
    )
