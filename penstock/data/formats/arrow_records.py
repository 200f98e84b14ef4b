"""Rows of a Parquet file as JSON objects, for sources whose records have several fields.

The process that reads risky formats hands it files; `sources/tables.py` asks for them. It must
never know what a field means. Source: Apache Parquet through pyarrow.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from penstock.data.formats.arrow import arrow_errors, open_parquet, rows_per_batch, validated
from penstock.data.formats.sequence import Facts, TokenSequence, damaged


def row_groups(path: Path) -> list[int]:
    """Uncompressed bytes of each row group.

    Raises:
        DataError: damaged.
    """
    with arrow_errors(path), open_parquet(path) as file:
        metadata = file.metadata
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


class Reader:
    """Some columns of a run of row groups, a batch of rows at a time."""

    def __init__(self, path: Path, columns: Sequence[str], start: int, end: int | None) -> None:
        """Take those of `columns` that there are, of the groups from `start` up to `end`.

        Raises:
            DataError: damaged, or none of the columns.
        """
        self._path = path
        with arrow_errors(path), open_parquet(path) as file:
            self._columns = [name for name in file.schema_arrow.names if name in columns]
            stop = file.metadata.num_row_groups if end is None else end
            self._groups = list(range(start, stop))
            if not self._columns:
                names = ", ".join(file.schema_arrow.names[:9])
                raise damaged(
                    path, f"has only the columns {names}", "set source.text_key and the like"
                )
        self.facts = Facts(None, None, "json")

    def sequences(self) -> Iterator[TokenSequence]:
        """Refuse: rows of text are no token sequences."""
        raise damaged(self._path, "holds text, no token ids")

    def texts(self) -> Iterator[str]:
        """Yield each row as JSON.

        Raises:
            DataError: damaged further in.
        """
        with arrow_errors(self._path), open_parquet(self._path) as file:
            size = min(256, rows_per_batch(file.metadata))
            batches = file.iter_batches(
                size, row_groups=self._groups, columns=self._columns, use_threads=False
            )
            for batch in map(validated, batches):
                for row in batch.to_pylist():
                    yield json.dumps(row, default=str)
