"""Two- and three-dimensional int32 datasets of a foreign HDF5 file, read under limits.

`sambanova.py` and `cerebras.py` read through here. Only what a plain writer makes is read: hard
links, contiguous or chunked storage, gzip and shuffle. Compressed chunks are unpacked here and not
by the library, whose own unpacking grows without limit. It must never follow a file's pointer to
another file. Source: HDF5 file format, The HDF Group (storage and filters through h5py).
"""

import contextlib
import math
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from penstock.data.formats import lzf
from penstock.data.formats.sequence import LARGEST_BYTES, damaged
from penstock.errors import DataError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LAYOUTS: Any = h5py.h5d  # type: ignore[attr-defined] - compiled, without stubs
_FILTERS: Any = h5py.h5z  # type: ignore[attr-defined] - as above
_OLDEST_LIBRARY = (2, 0, 0)
"""Older libraries overflow their heap on crafted files (CVE-2026-26200, CVE-2016-4333)."""
_LARGEST_RATIO = 1000
"""Elements may claim at most this many times the file's bytes; deflate itself reaches 1,032."""
_SMALL = 1 << 20
"""Files whose content is below this may have any ratio."""


@contextlib.contextmanager
def hdf5_file(path: Path) -> Generator[h5py.File]:
    """Open a file to read; whatever the library raises meanwhile is a `DataError`."""
    if h5py.version.hdf5_version_tuple < _OLDEST_LIBRARY:
        raise DataError(
            f"HDF5 {h5py.version.hdf5_version} is too old to read files of others safely",
            where=str(path),
            do="install h5py 3.16 or newer",
        )
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError, ValueError and more
        raise damaged(path, f"is not a readable HDF5 file ({type(error).__name__})") from None


def dataset_names(path: Path) -> set[str]:
    """Names in the root of a file.

    Raises:
        DataError: it is damaged.
    """
    with hdf5_file(path) as file:
        # A name that is not UTF-8 comes as bytes.
        return {name if isinstance(name, str) else repr(name) for name in file}


class Rows:
    """One dataset of int32, row by row along its first dimension."""

    def __init__(self, file: h5py.File, path: Path, name: str, dimensions: int) -> None:
        """Check the dataset; reads no element.

        Raises:
            DataError: no such dataset, or one this does not read.
        """
        self._path, self._name = path, name
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise self._wrong("is missing, or a link elsewhere")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim != dimensions:
            raise self._wrong(f"is no array of {dimensions} dimensions")
        if dataset.dtype != np.dtype("<i4"):
            raise self._wrong(f"holds {dataset.dtype}, not int32")
        self._dataset: Any = dataset
        self._chunks: tuple[int, ...] = dataset.chunks or ()
        """Shape of a chunk; empty where storage is contiguous."""
        self.shape: tuple[int, ...] = dataset.shape
        self._size = path.stat().st_size
        self._check_storage()
        self._band: tuple[int, NDArray[np.int32]] | None = None
        """First row and content of the band of chunks read last."""

    @property
    def block_rows(self) -> int:
        """Rows that are read together at little cost."""
        row_bytes = max(1, 4 * math.prod(self.shape[1:]))
        chunk_rows = self._chunks[0] if self._chunks else 1
        return max(1, _SMALL // row_bytes // chunk_rows) * chunk_rows

    def read(self, first: int, last: int) -> NDArray[np.int32]:
        """Rows `first` up to, not including, `last`."""
        if not self._chunks:
            return np.asarray(self._dataset[first:last])
        step = self._chunks[0]
        parts: list[NDArray[np.int32]] = []
        for start in range(first - first % step, last, step):
            if self._band is None or self._band[0] != start:
                self._band = (start, self._read_band(start))
            parts.append(self._band[1][max(0, first - start) : last - start])
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), np.int32)

    def extents(self) -> NDArray[np.int64]:
        """First byte and the byte after the last, (parts, 2), of what the file stores of it.

        Raises:
            DataError: a part of it lies outside the file.
        """
        found: list[tuple[int, int]] = []
        if self._chunks:
            self._dataset.id.chunk_iter(lambda one: found.append((one.byte_offset, one.size)))
        elif self.shape[0]:
            found.append((self._dataset.id.get_offset(), 4 * math.prod(self.shape)))
        places = [(place, place + size) for place, size in found]
        if any(not 0 <= first <= last <= self._size for first, last in places):
            raise self._wrong("lies in part outside the file")
        return np.array(places, np.int64).reshape(-1, 2)

    def _check_storage(self) -> None:
        """Refuse external and virtual storage, other filters, and sizes the file cannot hold."""
        dataset, properties = self._dataset, self._dataset.id.get_create_plist()
        if dataset.is_virtual or dataset.external:
            raise self._wrong("keeps its data in other files")
        layout = properties.get_layout()
        if layout not in (_LAYOUTS.CONTIGUOUS, _LAYOUTS.CHUNKED):
            raise self._wrong("is stored in a way that is not read")
        self._filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        packing = [f for f in self._filters if f != _FILTERS.FILTER_SHUFFLE]
        if packing not in ([], [_FILTERS.FILTER_DEFLATE], [lzf.FILTER]) or self._filters not in (
            packing,
            [_FILTERS.FILTER_SHUFFLE, *packing],
        ):
            raise self._wrong("is compressed by something other than gzip and lzf")
        if 0 in self.shape[1:]:
            raise self._wrong("has rows without elements")
        logical = 4 * math.prod(self.shape)
        if logical > max(_SMALL, self._size * _LARGEST_RATIO):
            raise self._wrong(f"claims {logical:,} bytes, the file has {self._size:,}")
        rows = self._chunks[0] if self._chunks else 1
        if 4 * max(rows * math.prod(self.shape[1:]), math.prod(self._chunks)) > LARGEST_BYTES:
            raise self._wrong("has rows or chunks of more than 256 MiB")
        if layout == _LAYOUTS.CONTIGUOUS and self.shape[0]:
            offset = dataset.id.get_offset()
            if offset is None or offset + logical > self._size:
                raise self._wrong("ends before its last row")

    def _read_band(self, start: int) -> NDArray[np.int32]:
        """All chunks whose first row is `start`, side by side."""
        chunk = self._chunks
        last = min(start + chunk[0], self.shape[0])
        band = np.empty((last - start, *self.shape[1:]), np.int32)
        columns = (range(0, n, c) for n, c in zip(self.shape[1:], chunk[1:], strict=True))
        for place in _product(*columns):
            block = self._read_chunk((start, *place))
            target = tuple(slice(p, p + c) for p, c in zip(place, chunk[1:], strict=True))
            view = band[(slice(None), *target)]
            view[...] = block[tuple(slice(0, n) for n in view.shape)]
        return band

    def _read_chunk(self, place: tuple[int, ...]) -> NDArray[np.int32]:
        """One chunk, unpacked here: never more than its declared size comes into being."""
        shape = self._chunks
        expected = 4 * math.prod(shape)
        stored = self._dataset.id.get_chunk_info_by_coord(place)
        if stored.byte_offset is None:
            raise self._wrong(f"lacks the rows from {place[0]}")
        if stored.size > expected + 1024 or stored.byte_offset + stored.size > self._size:
            raise self._wrong(f"has a chunk of {stored.size:,} bytes at row {place[0]}")
        mask, data = self._dataset.id.read_direct_chunk(place)
        steps = [f for i, f in enumerate(self._filters) if not mask & (1 << i)]
        if _FILTERS.FILTER_DEFLATE in steps:
            unpack = zlib.decompressobj()
            data = unpack.decompress(data, expected)
            if not unpack.eof and unpack.decompress(unpack.unconsumed_tail, 1):
                raise self._wrong(f"has a chunk that unpacks to too much at row {place[0]}")
        if lzf.FILTER in steps:
            try:
                data = lzf.decompress(data, expected)
            except ValueError as error:
                raise self._wrong(f"has a damaged chunk at row {place[0]}: {error}") from None
        if len(data) != expected:
            raise self._wrong(f"has a chunk of another size at row {place[0]}")
        if _FILTERS.FILTER_SHUFFLE in steps:
            data = np.frombuffer(data, np.uint8).reshape(4, -1).T.tobytes()
        return np.frombuffer(data, "<i4").reshape(shape)

    def _wrong(self, how: str) -> DataError:
        return damaged(self._path, f"cannot be read: {self._name} {how}")


def check_apart(path: Path, *datasets: Rows) -> None:
    """No two of a file's datasets, nor two chunks of one, lie over one another.

    Raises:
        DataError: they do, or lie outside the file.
    """
    places = np.concatenate([rows.extents() for rows in datasets])
    places = places[np.lexsort((places[:, 1], places[:, 0]))]
    if (places[1:, 0] < places[:-1, 1]).any():
        raise damaged(path, "has rows that lie over one another")


def _product(*ranges: range) -> Generator[tuple[int, ...]]:
    """All combinations; `itertools.product` would hold a range of any claimed length in memory."""
    if not ranges:
        yield ()
        return
    for first in ranges[0]:
        for rest in _product(*ranges[1:]):
            yield (first, *rest)


class RowWriter:
    """An int32 dataset that grows as rows come, gzip level 4."""

    def __init__(self, file: h5py.File, name: str) -> None:
        """Create nothing yet: the dataset's chunks follow the first block, as h5py guesses."""
        self._file, self._name = file, name
        self._dataset: Any = None

    @property
    def empty(self) -> bool:
        """Whether no block has come yet, so that there is no dataset."""
        return self._dataset is None

    def append(self, block: NDArray[Any]) -> None:
        """Add rows."""
        if self._dataset is None:
            self._dataset = self._file.create_dataset(
                self._name,
                data=np.ascontiguousarray(block, np.int32),
                maxshape=(None, *block.shape[1:]),
                compression="gzip",
            )
            return
        rows = len(self._dataset)
        self._dataset.resize(rows + len(block), axis=0)
        self._dataset[rows:] = block
