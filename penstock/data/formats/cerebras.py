"""HDF5 files of Cerebras' Model Zoo: rows of ids, a mask and labels; also with two rows more.

`registry.py` hands it files to read and splits to write. Labels are the ids shifted by one; the
mask counted the positions outside the loss in early releases and those inside it since, so the
reader decides which from the data and says so. Files of five rows hold several sequences a row,
each starting at position 0. It must never know about tokenizers.
Source: Cerebras/modelzoo, data_preparation/nlp (layout only).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from penstock.data.formats.cerebras_mask import Mask, decide_mask
from penstock.data.formats.hdf5 import Rows, RowWriter, check_apart, hdf5_file
from penstock.data.formats.output import OutputFile
from penstock.data.formats.sequence import Facts, Layout, TokenSequence, damaged, weights_or_none
from penstock.errors import DataError
from penstock.files import atomic_write, read_json

_DATA = "data"
PARAMETERS = "data_params.json"
_IDS, _MASK, _LABELS, _SPANS, _POSITIONS = range(5)
_WRITE_BYTES = 1 << 20
_LARGEST_PARAMETERS = 16 << 20


def recognises(names: set[str]) -> bool:
    """Whether an HDF5 file with these datasets is of this format."""
    return _DATA in names


class Reader:
    """The files of one folder, which share one meaning of the mask."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Check every file, and decide the mask's meaning from those that tell.

        Raises:
            DataError: other names, shapes, types or storage, or counts that contradict.
        """
        self._paths = paths
        shapes = [self._open(path) for path in paths]
        if len({shape[1:] for shape in shapes}) != 1:
            raise damaged(paths[0].parent, "has files whose rows differ in shape")
        self._mask, self._known = self._decide()
        rows = sum(shape[0] for shape in shapes)
        kind = "5-row files (several sequences a row)" if shapes[0][1] == 5 else "3-row files"
        self.facts = Facts(
            sequences=None if shapes[0][1] == 5 else rows,
            tokens=rows * shapes[0][2],
            dtype="int32",
            width=shapes[0][2],
            vocab_size=self._known.get("vocab_size"),
            padding=self._mask.padding,
            notes=(kind, self._mask.reason),
        )

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield each sequence, without padding."""
        for path in self._paths:
            with hdf5_file(path) as file:
                rows = Rows(file, path, _DATA, 3)
                for first in range(0, rows.shape[0], rows.block_rows):
                    block = rows.read(first, min(first + rows.block_rows, rows.shape[0]))
                    yield from self._split(path, first, block)

    def _open(self, path: Path) -> tuple[int, ...]:
        with hdf5_file(path) as file:
            rows = Rows(file, path, _DATA, 3)
            check_apart(path, rows)
            shape = rows.shape
            if shape[1] not in (3, 5) or shape[2] == 0:
                raise damaged(path, f"has {_DATA} of shape {shape}, not (rows, 3 or 5, length)")
            if "n_examples" in file.attrs:
                count = np.asarray(file.attrs["n_examples"])
                if count.shape != () or count.dtype.kind not in "ui" or int(count) != shape[0]:
                    raise damaged(path, f"has {shape[0]} rows, its n_examples says otherwise")
        return shape

    def _decide(self) -> tuple[Mask, dict[str, int]]:
        known = _parameters(self._paths[0].parent / PARAMETERS)
        samples: list[NDArray[np.int32]] = []
        for path in self._paths[:4]:
            with hdf5_file(path) as file:
                rows = Rows(file, path, _DATA, 3)
                samples.append(rows.read(0, min(rows.shape[0], rows.block_rows))[:, :3])
        sample = np.concatenate(samples)
        return decide_mask(sample, known.get("pad_id"), known.get("inverted_mask")), known

    def _split(self, path: Path, first: int, block: NDArray[np.int32]) -> Iterator[TokenSequence]:
        """Sequences of a block of rows whose place in the file is `first`."""
        mask = block[:, _MASK]
        if mask.size and (mask.min() < 0 or mask.max() > 1):
            raise damaged(path, "has a mask that is not 0 or 1")
        counts = (mask == 1) != self._mask.inverted
        for number, (row, valid) in enumerate(zip(block, counts, strict=True)):
            length = _real_length(row, valid, self._mask.padding)
            starts = [0]
            if len(row) == 5 and length:
                starts = np.flatnonzero(row[_POSITIONS, :length] == 0).tolist()
                if not starts or starts[0] != 0:
                    raise damaged(path, f"row {first + number} does not start at position 0")
            where = f"{path}, row {first + number}"
            joined = _is_joined(row, valid, starts, length)
            for start, end in zip(starts, [*starts[1:], length], strict=True):
                ids, labels = row[_IDS, start:end], row[_LABELS, start:end]
                whole = joined and end < length
                yield self._sequence(where, ids, labels, valid[start:end], whole)

    def _sequence(
        self,
        where: str,
        ids: NDArray[np.int32],
        labels: NDArray[np.int32],
        valid: NDArray[np.bool_],
        whole: bool,
    ) -> TokenSequence:
        """Join ids and their shifted labels to one run of tokens; `whole`: ids are all of it."""
        if len(ids) == 0:
            return TokenSequence(ids)
        if bool(((labels[:-1] != ids[1:]) & valid[:-1]).any()):
            raise damaged(where, "has labels that are not its inputs shifted by one")
        if whole or (not valid[-1] and labels[-1] == self._mask.padding):
            tokens, targets = ids, valid[:-1]
        else:
            tokens, targets = np.append(ids, labels[-1]), valid
        # Nothing precedes a first token, so that no file says what it weighs.
        weights = np.concatenate([[bool(targets.all())], targets])
        return TokenSequence(tokens, weights_or_none(weights))


def _is_joined(
    row: NDArray[np.int32], valid: NDArray[np.bool_], starts: list[int], length: int
) -> bool:
    """Whether a row of several sequences was shifted as one.

    Later releases do so: a sequence's last token is an input too, whose label is the first token
    of the next one, outside the loss. Earlier ones shift each sequence by itself.
    """
    shifted = row[_LABELS, : length - 1] == row[_IDS, 1:length]
    borders = np.array(starts[1:], np.int64) - 1
    return len(borders) > 0 and bool(shifted.all()) and not bool(valid[borders].any())


def _real_length(row: NDArray[np.int32], valid: NDArray[np.bool_], padding: int | None) -> int:
    """Positions before the padding at the end."""
    if padding is None:
        return row.shape[1]
    real = np.flatnonzero((row[_IDS] != padding) | (row[_LABELS] != padding) | valid)
    return int(real[-1]) + 1 if len(real) else 0


def _parameters(path: Path) -> dict[str, int]:
    """The values of data_params.json that matter here; nothing where it does not read."""
    if not path.is_file() or path.stat().st_size > _LARGEST_PARAMETERS:
        return {}
    found: dict[str, int] = {}
    try:
        sections = read_json(path)
        for section in ("setup", "processing", "dataset", "post-process"):
            values = sections.get(section, {})
            for name, kind in (("pad_id", int), ("vocab_size", int), ("inverted_mask", bool)):
                if type(values.get(name)) is kind and values[name] >= 0:
                    found[name] = values[name]
    except (DataError, AttributeError):
        return {}
    return found


class Writer:
    """One split as a folder SPLIT with .h5 files and one data_params.json; masks as of today."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Rows of `layout.width` positions hold one token more; five rows where `packed`."""
        self._folder, self._layout = folder / split, layout
        self._output = OutputFile(self._folder / f"data-{layout.file:05}.h5")
        self._file = h5py.File(self._output.temporary, "w")
        self._output.opened(self._file.close)
        self._data = RowWriter(self._file, _DATA)
        self._rows_of_item = 5 if layout.packed else 3
        self._block: list[NDArray[np.int32]] = []
        self._at = 0
        """Positions taken in the row being filled."""
        self._per_block = max(1, _WRITE_BYTES // (4 * self._rows_of_item * layout.width))
        self._stats = {"num_sequences": 0, "non_pad_tokens": 0, "loss_valid_tokens": 0}
        self._real = 0

    def append(self, sequence: TokenSequence) -> None:
        """Add one sequence: in a row of its own, or behind others where it fits."""
        tokens, weights = sequence.tokens, sequence.loss_weights()
        if self._layout.packed and len(tokens) == 0:
            return
        length = max(1, len(tokens) - 1) if self._layout.packed else self._layout.width
        if not self._block or not self._layout.packed or self._at + length > self._layout.width:
            self._new_row()
        row, at = self._block[-1], self._at
        # Behind others a last token is a target only; alone it is also the input before padding.
        inputs, targets = tokens[:length], tokens[1:]
        row[_IDS, at : at + len(inputs)] = inputs
        row[_LABELS, at : at + len(targets)] = targets
        row[_MASK, at : at + len(targets)] = weights[1:] > 0
        if self._layout.packed:
            row[_SPANS, at : at + length] = np.arange(length)[::-1]
            row[_POSITIONS, at : at + length] = np.arange(length)
        self._at += length
        self._real += len(inputs)

    def finish(self) -> list[Path]:
        """Write the rest, and data_params.json."""
        self._flush()
        if self._data.empty:
            self._data.append(np.empty((0, self._rows_of_item, self._layout.width), np.int32))
        self._file.attrs["n_examples"] = self._stats["num_sequences"]
        path = self._output.finish()
        parameters = self._folder / PARAMETERS
        atomic_write(parameters, json.dumps(self._parameters(path), indent=4))
        return [path, parameters]

    def abandon(self) -> None:
        """Leave nothing."""
        self._output.abandon()

    def _new_row(self) -> None:
        if len(self._block) == self._per_block:
            self._flush()
        row = np.zeros((self._rows_of_item, self._layout.width), np.int32)
        row[[_IDS, _LABELS]] = self._layout.padding
        self._block.append(row)
        self._at = 0

    def _flush(self) -> None:
        if self._block:
            block = np.stack(self._block)
            self._data.append(block)
            self._stats["num_sequences"] += len(block)
            self._stats["loss_valid_tokens"] += int(block[:, _MASK].sum())
            self._stats["non_pad_tokens"] += self._real
            self._block, self._real = [], 0

    def _parameters(self, path: Path) -> dict[str, Any]:
        width = self._layout.width
        stats, size = dict(self._stats), path.stat().st_size
        if self._layout.file:
            earlier = read_json(self._folder / PARAMETERS)
            size += earlier["post-process"]["output_bytes"]
            for name in stats:
                stats[name] += earlier["h5_dataset_stats"][name]
        rows = stats["num_sequences"]
        return {
            "setup": {"output_dir": self._folder.name, "data_format": "hdf5"},
            "processing": {"max_seq_length": width, "input_ids_dtype": "int32"},
            "dataset": {"use_vsl": self._layout.packed, "inverted_mask": False},
            "post-process": {
                "n_examples": rows,
                "eos_id": self._layout.padding,
                "pad_id": self._layout.padding,
                "vocab_size": self._layout.vocab_size,
                "num_output_files": self._layout.file + 1,
                "output_bytes": size,
            },
            "h5_dataset_stats": {**stats, "num_tokens": rows * width},
        }
