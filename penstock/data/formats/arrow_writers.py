"""Parquet files and saved `datasets` folders of token ids.

`registry.py` hands them splits to write. The saved folder is one `datasets.load_from_disk` opens.
Source: Hugging Face datasets, Dataset.save_to_disk (file names and keys only).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc, parquet

from penstock.data.formats.columns import IDS, ROLES, WEIGHTS
from penstock.data.formats.output import OutputFile
from penstock.data.formats.sequence import Layout, TokenSequence, roles_of
from penstock.files import atomic_write, read_json, sha256_file

_BATCH_TOKENS = 1 << 18
STATE, DICTIONARY, INFORMATION = "state.json", "dataset_dict.json", "dataset_info.json"


class _TableWriter:
    """Batches of rows, handed to a pyarrow writer."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._output, self._padding = OutputFile(path), layout.padding
        fields = [pa.field(IDS, pa.list_(pa.int32()))]
        if layout.weights:
            fields.append(pa.field(WEIGHTS, pa.list_(pa.float32())))
        if layout.roles:
            fields.append(pa.field(ROLES, pa.list_(pa.uint8())))
        self._schema = pa.schema(fields)
        self._writer: Any = self._open(self._output.temporary)
        self._output.opened(self._close)
        self._rows: list[TokenSequence] = []
        self._tokens = 0

    def _open(self, path: Path) -> Any:  # noqa: ANN401 - pyarrow has no types
        return parquet.ParquetWriter(path, self._schema, write_page_checksum=True)

    def _close(self) -> None:
        self._writer.close()

    def append(self, sequence: TokenSequence) -> None:
        """Add one row."""
        self._rows.append(sequence)
        self._tokens += len(sequence.tokens)
        if self._tokens >= _BATCH_TOKENS:
            self._flush()

    def finish(self) -> list[Path]:
        """Write the rest and name the file."""
        self._flush()
        return [self._output.finish()]

    def abandon(self) -> None:
        """Leave nothing."""
        self._output.abandon()

    def _flush(self) -> None:
        if not self._rows:
            return
        kinds = {
            IDS: (np.int32, [row.tokens for row in self._rows]),
            WEIGHTS: (np.float32, [row.loss_weights() for row in self._rows]),
            ROLES: (np.uint8, [roles_of(row, self._padding) for row in self._rows]),
        }
        ends = np.cumsum([0, *(len(row.tokens) for row in self._rows)]).astype(np.int32)
        columns = [
            pa.ListArray.from_arrays(ends, np.concatenate(parts).astype(dtype))
            for dtype, parts in (kinds[name] for name in self._schema.names)
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows, self._tokens = [], 0


class ParquetWriter(_TableWriter):
    """SPLIT.parquet, or SPLIT-00000-of-00002.parquet and so on."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Begin the file."""
        many = f"-{layout.file:05}-of-{layout.files:05}" if layout.files > 1 else ""
        super().__init__(folder / f"{split}{many}.parquet", layout)


class SavedFolderWriter(_TableWriter):
    """SPLIT/ as `Dataset.save_to_disk` leaves it, and dataset_dict.json above."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Begin the Arrow stream."""
        self._folder, self._split = folder, split
        self._is_first = layout.file == 0
        name = f"data-{layout.file:05}-of-{layout.files:05}.arrow"
        super().__init__(folder / split / name, layout)

    def _open(self, path: Path) -> Any:  # noqa: ANN401 - pyarrow has no types
        self._file = path.open("wb")
        return ipc.new_stream(self._file, self._schema)

    def _close(self) -> None:
        super()._close()
        self._file.close()

    def finish(self) -> list[Path]:
        """Name the stream, then write what tells `datasets` of it."""
        (path,) = super().finish()
        known = path.with_name(STATE)
        earlier = [] if self._is_first else read_json(known)["_data_files"]
        state = {
            "_data_files": [*earlier, {"filename": path.name}],
            "_fingerprint": sha256_file(path)[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": self._split,
        }
        information = {"citation": "", "description": "", "homepage": "", "license": ""}
        atomic_write(path.with_name(INFORMATION), json.dumps(information, indent=2))
        atomic_write(path.with_name(STATE), json.dumps(state, indent=2))
        dictionary = self._folder / DICTIONARY
        splits = read_json(dictionary)["splits"] if dictionary.is_file() else []
        splits += [self._split] if self._split not in splits else []
        atomic_write(dictionary, json.dumps({"splits": splits}))
        return [path, path.with_name(INFORMATION), path.with_name(STATE), dictionary]
