"""The formats there are, and what each can hold.

`recognize.py` names a format, `data/convert.py` and `inspect` open it here. It must never look at
file names to learn what a file is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from penstock.data.formats import (
    arrow_writers,
    cerebras,
    indexed,
    jsonl,
    npy,
    pickled,
    raw,
    sambanova,
    tfrecord,
)
from penstock.data.formats.isolation import IsolatedReader
from penstock.data.formats.sequence import LARGEST_ID, Joined, Layout, Reader, Writer

_LONGEST_ROW = 1 << 20
"""Longer sequences are streams: what is to be made of them must be said."""
_LONGEST_RECORD = 1 << 22
"""A record is read, and in places written, as a whole."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One format."""

    title: str
    """What people call it."""
    read: Callable[[Sequence[Path]], Reader]
    """Open files of this format as one reader."""
    write: Callable[[Path, str, Layout], Writer]
    """Begin a split in a folder."""
    weights: Literal["none", "zero or one", "any"]
    """Which loss weights it holds."""
    roles: bool = False
    """Whether it holds prompt, completion, padding and separator."""
    categories: bool = False
    """Whether it holds a category for each token."""
    borders: Literal["none", "equal lengths", "any"] = "any"
    """Whether sequences stay apart."""
    many: bool = False
    """Whether a split may be several files, as the format's own tool writes them."""
    as_rows: bool = False
    """Whether full packing writes rows of `data.sequence_length`, not one stream or documents."""
    fixed_width: bool = False
    """Whether rows have one length and shorter ones are padded."""
    extra: int = 0
    """Tokens a row holds beyond its width: Cerebras' rows hold inputs and shifted labels."""
    first_weight: bool = True
    """Whether a sequence's first token keeps its weight."""
    largest: int = LARGEST_ID
    """Largest token id it holds."""
    longest: int | None = None
    """Tokens of the longest sequence that makes sense as one record; None: any length does."""


def _each(reader: Callable[[Path], Reader]) -> Callable[[Sequence[Path]], Reader]:
    """Open files one by one and join them."""
    return lambda paths: Joined([reader(path) for path in paths])


def _isolated(kind: str) -> Callable[[Sequence[Path]], Reader]:
    """Open files in the process that reads risky formats."""
    return lambda paths: IsolatedReader(kind, paths)


FORMATS: dict[str, Format] = {
    "megatron": Format(
        "Megatron indexed .bin/.idx", _each(indexed.Reader), indexed.Writer, weights="any"
    ),
    "sambanova": Format(
        "SambaNova HDF5 (generative_data_prep)",
        _isolated("sambanova"),
        sambanova.Writer,
        weights="zero or one",
        many=True,
        as_rows=True,
        roles=True,
        categories=True,
        fixed_width=True,
        longest=_LONGEST_ROW,
    ),
    "cerebras": Format(
        "Cerebras HDF5",
        _isolated("cerebras"),
        cerebras.Writer,
        weights="zero or one",
        many=True,
        as_rows=True,
        fixed_width=True,
        longest=_LONGEST_ROW,
        extra=1,
        first_weight=False,
    ),
    "tfrecord": Format(
        "TFRecord with an index",
        _each(tfrecord.Reader),
        tfrecord.Writer,
        weights="any",
        many=True,
        as_rows=True,
        roles=True,
        longest=_LONGEST_RECORD,
    ),
    "parquet": Format(
        "Parquet",
        _isolated("table"),
        arrow_writers.ParquetWriter,
        weights="any",
        many=True,
        as_rows=True,
        roles=True,
        longest=_LONGEST_RECORD,
    ),
    "arrow": Format(
        "Arrow, saved datasets folder",
        _isolated("table"),
        arrow_writers.SavedFolderWriter,
        weights="any",
        many=True,
        as_rows=True,
        roles=True,
        longest=_LONGEST_RECORD,
    ),
    "jsonl": Format(
        "JSON lines of token ids",
        _each(jsonl.Reader),
        jsonl.Writer,
        weights="any",
        as_rows=True,
        roles=True,
        longest=_LONGEST_RECORD,
    ),
    "pickle": Format(
        "Pickled lists (Graphcore)", _each(pickled.Reader), pickled.Writer, weights="none"
    ),
    "npy": Format(
        "NumPy .npy", _each(npy.Reader), npy.Writer, weights="none", borders="equal lengths"
    ),
    "llmc": Format(
        "llm.c .bin", _each(raw.LlmcReader), raw.LlmcWriter, weights="none", borders="none"
    ),
    "nanogpt": Format(
        "nanoGPT .bin (bare uint16)",
        _each(raw.BareReader),
        raw.BareWriter,
        weights="none",
        borders="none",
        largest=raw.LARGEST_UINT16,
    ),
}
