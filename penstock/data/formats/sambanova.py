"""HDF5 files of SambaNova's generative_data_prep: rows of token ids and of their roles.

`registry.py` hands it files to read and splits to write. `token_type_ids` are the loss weights:
completions and separators weigh 1, prompts and padding 0. It must never know about tokenizers.
Source: sambanova/generative_data_prep, data_buffers/hdf5_file_buffer.py (layout only).
"""

import datetime
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from numpy.typing import NDArray

from penstock.data.formats.hdf5 import Rows, RowWriter, check_apart, hdf5_file
from penstock.data.formats.output import OutputFile
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
from penstock.files import atomic_write, read_json, sha256_file

_IDS, _ROLES, _CATEGORIES = "input_ids", "token_type_ids", "category_ids"
_NO_CATEGORY = -1
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_WRITE_BYTES = 1 << 20
"""The original writes in blocks of a mebibyte; equal blocks give an equal chunk layout."""
METADATA, CHECKSUMS = "metadata.yaml", "sha256/files_metadata.json"
_LOOKED_AT = 16
"""Rows in which the padding's id is looked for: a dataset can have thousands of files."""
_LARGEST_METADATA = 1 << 20


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
                vocab_size=_vocab_size(path.parent / METADATA),
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


def _vocab_size(path: Path) -> int | None:
    """Vocabulary as metadata.yaml names it, if there is one that reads."""
    if not path.is_file() or path.stat().st_size > _LARGEST_METADATA:
        return None
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    size = value.get("vocab_size") if isinstance(value, dict) else None
    return size if isinstance(size, int) and size > 0 else None


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
        metadata = self._metadata()
        atomic_write(self._folder / METADATA, yaml.safe_dump(metadata, sort_keys=True))
        checksums = self._folder / CHECKSUMS
        known = read_json(checksums) if checksums.is_file() else {}
        for file in (path, self._folder / METADATA):
            known[file.name] = _checksum(file)
        atomic_write(checksums, json.dumps(known, indent=4))
        return [path, self._folder / METADATA, checksums]

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

    def _metadata(self) -> dict[str, Any]:
        """metadata.yaml with this split's figures; those of other splits stay."""
        path = self._folder / METADATA
        values: dict[str, Any] = {
            "max_batch_size_train": None,
            "max_batch_size_dev": None,
            "number_of_training_files": 0,
            "number_of_dev_files": 0,
            "number_of_test_files": 0,
            "tokenizer_model_type": None,
        }
        if path.is_file():
            values |= yaml.safe_load(path.read_text(encoding="utf-8"))
        name = "training" if self._split == "train" else self._split
        prompt, completion, padding, separators = (int(n) for n in self._counts)
        counts = {
            "sequences": self._rows,
            "prompt_tokens": prompt,
            "completion_tokens": completion + separators,
            "padding_tokens": padding,
        }
        largest = self._rows
        if self._layout.file:
            counts = {key: n + values[f"{self._split}_{key}"] for key, n in counts.items()}
            largest = min(largest, values.get(f"max_batch_size_{self._split}") or 0)
        if self._split != "test":
            values[f"max_batch_size_{self._split}"] = largest or None
        return values | {
            "max_seq_length": self._layout.width,
            "token_type_ids": True,
            "vocab_size": self._layout.vocab_size,
            f"number_of_{name}_files": self._layout.files,
            **{f"{self._split}_{key}": n for key, n in counts.items()},
        }


def _checksum(path: Path) -> dict[str, Any]:
    status = path.stat()
    modified = datetime.datetime.fromtimestamp(status.st_mtime, datetime.UTC)
    return {
        "sha256": sha256_file(path),
        "size": status.st_size,
        "modified_time": modified.isoformat(),
    }
