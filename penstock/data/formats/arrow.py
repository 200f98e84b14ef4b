"""Parquet files, Arrow files and streams with token ids, or with a column of raw text.

`registry.py` hands it files to read; `arrow_writers.py` writes them. Columns are those of
`columns.py`. It must never use an offset of a foreign file before the batch has been validated.
Source: Apache Arrow and Parquet through pyarrow; Hugging Face `datasets` saves Arrow streams.
"""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc, parquet

from penstock.data.formats.columns import USED, WEIGHTS, find_ids, to_sequence
from penstock.data.formats.sequence import LARGEST_BYTES, Facts, TokenSequence, damaged
from penstock.errors import DataError

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
TEXT = "text"
_BATCH_VALUES = 1 << 20
_LARGEST_RATIO = 1000
"""Values of four bytes may claim at most this many times the file's bytes."""
_SMALL = 1 << 20
_LARGEST_THRIFT = 100 << 20


@contextlib.contextmanager
def arrow_errors(path: Path) -> Generator[None]:
    """Whatever pyarrow raises is a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # ArrowInvalid, OSError, KeyError, NotImplementedError and more
        first = " ".join(str(error).split())[:100]
        raise damaged(path, f"does not read ({type(error).__name__}: {first})") from None


def open_parquet(path: Path) -> Any:  # noqa: ANN401 - pyarrow has no types
    """A Parquet file whose footer claims what is in proportion to its size.

    Raises:
        DataError: it claims more.
    """
    file = parquet.ParquetFile(
        path,
        memory_map=True,
        pre_buffer=False,
        page_checksum_verification=True,
        thrift_string_size_limit=_LARGEST_THRIFT,
        thrift_container_size_limit=1_000_000,
    )
    metadata = file.metadata
    limit = max(_SMALL, path.stat().st_size * _LARGEST_RATIO)
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            column = metadata.row_group(group).column(place)
            if not 0 <= max(4 * column.num_values, column.total_uncompressed_size) <= limit:
                file.close()
                raise damaged(path, f"claims {column.num_values:,} values in a column")
    return file


class Reader:
    """One file, a batch of rows at a time."""

    def __init__(self, path: Path) -> None:
        """Check the schema.

        Raises:
            DataError: damaged, or no column of token ids or text.
        """
        self._path = path
        with arrow_errors(path):
            schema, rows = self._schema()
            self._columns = [name for name in schema.names if name in USED]
            self.text_column: str | None = None
            """The column of raw text, where there are no token ids."""
            if find_ids(self._columns) is None:
                self.text_column = _text_column(schema)
                if self.text_column is None:
                    names = ", ".join(schema.names[:9])
                    raise damaged(path, f"has no input_ids nor text among its columns {names}")
            for name in self._columns if self.text_column is None else ():
                _check_type(schema.field(name), path)
        kind = "text" if self.text_column else str(_values(schema.field(self._ids).type))
        notes = (f"raw text in the column {self.text_column}",) if self.text_column else ()
        if "token_type_ids" in schema.names:
            notes += ("token_type_ids are the tokenizer's segments and are not read",)
        self.facts = Facts(rows, None, kind, notes=notes)

    @property
    def _ids(self) -> str:
        return find_ids(self._columns) or ""

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield each row.

        Raises:
            DataError: damaged further in, or text.
        """
        if self.text_column is not None:
            raise damaged(self._path, "holds text, no token ids", "set tokenizer.from=FOLDER")
        row = 0
        for batch in self._batches(self._columns):
            columns = {name: _lists(batch.column(name), self._path) for name in self._columns}
            for number in range(batch.num_rows):
                one = {name: column[number] for name, column in columns.items()}
                yield to_sequence(one, f"{self._path}, row {row + number}")
            row += batch.num_rows

    def texts(self) -> Iterator[str]:
        """Yield the text of each row, where there is such a column."""
        name = self.text_column or ""
        for batch in self._batches([name]):
            column = batch.column(name)
            if column.null_count:
                raise damaged(self._path, f"has rows without {name}")
            with arrow_errors(self._path):
                yield from column.to_pylist()

    def _schema(self) -> tuple[pa.Schema, int | None]:
        """Schema and, where the file states it, rows."""
        if _magic(self._path) == PARQUET:
            with open_parquet(self._path) as file:
                return file.schema_arrow, file.metadata.num_rows
        with self._ipc() as source:
            return source.schema, None

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Validated record batches of some columns."""
        with arrow_errors(self._path):
            if _magic(self._path) == PARQUET:
                with open_parquet(self._path) as file:
                    size = rows_per_batch(file.metadata)
                    batches = file.iter_batches(size, columns=columns, use_threads=False)
                    yield from map(validated, batches)
            else:
                with self._ipc() as source:
                    places = [source.schema.get_field_index(name) for name in columns]
                options = ipc.IpcReadOptions(included_fields=places, use_threads=False)
                with self._ipc(options) as source:
                    yield from map(validated, _each_batch(source))

    def _ipc(self, options: Any = None) -> Any:  # noqa: ANN401 - pyarrow has no types
        source = pa.memory_map(str(self._path))
        if _magic(self._path) == ARROW_STREAM:
            return ipc.open_stream(source, options=options)
        return ipc.open_file(source, options=options)


def recognises(head: bytes) -> bool:
    """Whether a file that begins so is one of the three."""
    return head.startswith((PARQUET, ARROW_FILE + b"\0\0")) or (
        # A stream begins with its schema's length, which is small.
        head.startswith(ARROW_STREAM) and 0 < int.from_bytes(head[4:8], "little") < _SMALL
    )


def _magic(path: Path) -> bytes:
    with path.open("rb") as handle:
        head = handle.read(6)
    return head if head == ARROW_FILE else head[:4]


def rows_per_batch(metadata: Any) -> int:  # noqa: ANN401 - parquet's FileMetaData
    """Rows that make about a million values together."""
    values = [
        metadata.row_group(group).column(place).num_values
        for group in range(metadata.num_row_groups)
        for place in range(metadata.num_columns)
    ]
    return max(1, min(1024, _BATCH_VALUES * max(1, metadata.num_rows) // max(1, *values, 1)))


def _each_batch(source: Any) -> Iterator[pa.RecordBatch]:  # noqa: ANN401 - file or stream
    if hasattr(source, "num_record_batches"):
        yield from (source.get_batch(i) for i in range(source.num_record_batches))
    else:
        yield from source


def validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, with every offset checked against what it points into."""
    if batch.num_rows and not batch.num_columns:
        raise ValueError("rows without columns")
    batch.validate(full=True)
    return batch


def _text_column(schema: pa.Schema) -> str | None:
    """The column named text, or the only one of strings."""
    strings = [
        field.name
        for field in schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    return TEXT if TEXT in strings else strings[0] if len(strings) == 1 else None


def _check_type(field: pa.Field, path: Path) -> None:
    """Lists of integers; weights may be lists of floats."""
    values = _values(field.type)
    floats = field.name == WEIGHTS and values is not None and pa.types.is_floating(values)
    if values is None or not (pa.types.is_integer(values) or floats):
        raise damaged(path, f"has {field.name} of type {field.type}, no list of integers")


def _values(kind: pa.DataType) -> pa.DataType | None:
    """Type of a list's items; None for what is no list."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind.value_type if any(is_list(kind) for is_list in lists) else None


class _Lists:
    """A column of lists as NumPy arrays, without copying."""

    def __init__(self, values: NDArray[Any], ends: NDArray[np.int64]) -> None:
        """`ends` holds one place more than there are rows."""
        self._values, self._ends = values, ends

    def __getitem__(self, row: int) -> NDArray[Any]:
        """The list of one row."""
        return self._values[self._ends[row] : self._ends[row + 1]]


def _lists(column: pa.Array, path: Path) -> _Lists:
    """A validated list column taken apart."""
    if column.null_count:
        raise damaged(path, "has rows that are null")
    values = column.flatten()
    if values.null_count or values.nbytes > LARGEST_BYTES:
        raise damaged(path, "has tokens that are null, or a batch of more than 256 MiB")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return _Lists(values.to_numpy(zero_copy_only=False), ends)
