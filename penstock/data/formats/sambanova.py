"""HDF5 files of SambaNova's generative_data_prep: rows of token ids and of their roles.

`registry.py` hands it files to read and splits to write. `token_type_ids` are the loss weights:
completions and separators weigh 1, prompts and padding 0. It must never know about tokenizers.
Source: sambanova/generative_data_prep, data_buffers/hdf5_file_buffer.py (layout only).
"""

import math
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from penstock.data.formats.hdf5 import Rows, RowWriter, check_apart, hdf5_file
from penstock.data.formats.output import OutputFile
from penstock.data.formats.sambanova_metadata import (
    METADATA,
    Counts,
    add_checksums,
    vocab_size,
    write_metadata,
)
from penstock.data.formats.sequence import (
    COMPLETION,
    PADDING,
    PROMPT,
    SEPARATOR,
    Facts,
    Layout,
    TokenSequence,
    damaged,
    roles_of,
    weights_or_none,
)

_IDS, _ROLES, _CATEGORIES = "input_ids", "token_type_ids", "category_ids"
_NO_CATEGORY = -1
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_WRITE_BYTES = 1 << 20
"""The original writes in blocks of a mebibyte; equal blocks give an equal chunk layout."""
_LOOKED_AT = 16
"""Rows in which the padding's id is looked for: a dataset can have thousands of files."""


def recognises(names: set[str]) -> bool:
    """Whether an HDF5 file with these datasets is of this format."""
    return {_IDS, _ROLES} <= names


class Reader:
    """One file, memory bounded by a block of rows."""

    def __init__(self, path: Path) -> None:
        """Check the two datasets.

        Raises:
            DataError: other names, shapes, types or storage.
        """
        self._path = path
        with hdf5_file(path) as file:
            ids, roles = Rows(file, path, _IDS, 2), Rows(file, path, _ROLES, 2)
            if ids.shape != roles.shape:
                raise damaged(path, f"has {_IDS} {ids.shape} but {_ROLES} {roles.shape}")
            categories = _categories(file, path)
            if categories is not None and categories.shape != ids.shape:
                raise damaged(path, f"has {_IDS} {ids.shape} but {_CATEGORIES} {categories.shape}")
            check_apart(path, *(rows for rows in (ids, roles, categories) if rows is not None))
            self.facts = Facts(
                sequences=ids.shape[0],
                tokens=math.prod(ids.shape),
                dtype="int32",
                width=ids.shape[1],
                vocab_size=vocab_size(path.parent / METADATA),
                padding=_padding(ids, roles),
            )

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield each row without the padding at its end."""
        with hdf5_file(self._path) as file:
            ids, roles = (Rows(file, self._path, name, 2) for name in (_IDS, _ROLES))
            categories = _categories(file, self._path)
            step = ids.block_rows
            for first in range(0, ids.shape[0], step):
                last = min(first + step, ids.shape[0])
                kinds = roles.read(first, last)
                if kinds.size and (kinds.min() < PROMPT or kinds.max() > SEPARATOR):
                    raise damaged(self._path, f"has {_ROLES} that are not 0, 1, 2 or 3")
                numbers = [None] * (last - first)
                if categories is not None:
                    numbers = categories.read(first, last)
                rows = zip(ids.read(first, last), kinds.astype(np.uint8), numbers, strict=True)
                for row in rows:
                    yield _sequence(*row)


def _categories(file: h5py.File, path: Path) -> Rows | None:
    """The numbers of categories, which a file need not have."""
    return Rows(file, path, _CATEGORIES, 2) if _CATEGORIES in file else None


def _padding(ids: Rows, roles: Rows) -> int | None:
    """The id of the padding in the first rows, if they have any."""
    last = min(ids.shape[0], _LOOKED_AT)
    found = ids.read(0, last)[roles.read(0, last) == PADDING]
    return int(found[0]) if len(found) and found[0] >= 0 else None


def _sequence(
    row: NDArray[np.int32], kinds: NDArray[np.uint8], categories: NDArray[np.int32] | None
) -> TokenSequence:
    """One row up to its last token that is no padding."""
    real = np.flatnonzero(kinds != PADDING)
    length = int(real[-1]) + 1 if len(real) else 0
    kinds = kinds[:length]
    weights = ((kinds == COMPLETION) | (kinds == SEPARATOR)).astype(np.float32)
    numbers = None if categories is None else categories[:length]
    return TokenSequence(row[:length], weights_or_none(weights), kinds, numbers)


class Writer:
    """One split as `SPLIT_1_of_N.hdf5` and so on; metadata and checksums grow with each file."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Write into `folder`, rows of `layout.width`."""
        self._folder, self._split, self._layout = folder, _SPLITS.get(split, split), layout
        self._output = OutputFile(
            folder / f"{self._split}_{layout.file + 1}_of_{layout.files}.hdf5"
        )
        self._file = h5py.File(self._output.temporary, "w")
        self._output.opened(self._file.close)
        self._ids, self._roles = RowWriter(self._file, _IDS), RowWriter(self._file, _ROLES)
        self._categories = RowWriter(self._file, _CATEGORIES)
        self._block: list[TokenSequence] = []
        self._rows_per_block = max(1, _WRITE_BYTES // (layout.width * 4))
        self._rows = 0
        self._counts = np.zeros(4, np.int64)

    def append(self, sequence: TokenSequence) -> None:
        """Add one row."""
        self._block.append(sequence)
        if len(self._block) == self._rows_per_block:
            self._flush()

    def finish(self) -> list[Path]:
        """Write the rest, metadata.yaml and the checksums."""
        if self._block or not self._rows:
            self._flush()
        path = self._output.finish()
        prompt, completion, padding, separators = (int(n) for n in self._counts)
        counts = Counts(self._rows, prompt, completion, padding, separators)
        metadata = write_metadata(self._folder, self._split, self._layout, counts)
        named = [(Path(file.name), file) for file in (path, metadata)]
        return [path, metadata, add_checksums(self._folder, named)]

    def abandon(self) -> None:
        """Leave nothing."""
        self._output.abandon()

    def _flush(self) -> None:
        shape = (len(self._block), self._layout.width)
        ids = np.full(shape, self._layout.padding, np.int32)
        roles = np.full(shape, PADDING, np.int32)
        for row, sequence in enumerate(self._block):
            length = len(sequence.tokens)
            ids[row, :length] = sequence.tokens
            roles[row, :length] = roles_of(sequence, self._layout.padding)
        self._ids.append(ids)
        self._roles.append(roles)
        if self._layout.categories:
            self._categories.append(self._categories_of_block(shape))
        self._counts += np.bincount(roles.ravel(), minlength=4)
        self._rows += len(self._block)
        self._block = []

    def _categories_of_block(self, shape: tuple[int, int]) -> NDArray[np.int32]:
        """The category of each token; -1 for padding, as for tokens that have none."""
        categories = np.full(shape, _NO_CATEGORY, np.int32)
        for row, sequence in enumerate(self._block):
            if sequence.categories is not None:
                categories[row, : len(sequence.categories)] = sequence.categories
        return categories
