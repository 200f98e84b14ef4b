"""TFRecord files of `tf.train.Example` with `input_ids`, and their index, without TensorFlow.

`registry.py` hands it files to read and splits to write. Graphcore's GPT-2 reads and writes such
files. Loss weights and roles travel as further lists, which other readers pass over. It must never
use a length before its checksum.
Source: TensorFlow's record format; graphcore/examples, nlp/gpt2 (names only); `.index` as
`tfrecord2idx` writes it: offset and length of each record, its framing included.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from penstock.data.formats.crc32c import masked_crc32c
from penstock.data.formats.example import MalformedError, make_example, parse_example
from penstock.data.formats.output import OutputFile
from penstock.data.formats.sequence import (
    LARGEST_BYTES,
    SEPARATOR,
    Facts,
    Layout,
    TokenSequence,
    damaged,
    weights_or_none,
)

IDS, WEIGHTS, ROLES = "input_ids", "loss_weights", "token_roles"
_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
_FRAME_BYTES = 16


def recognises(head: bytes) -> bool:
    """Whether a file that begins so holds records: its first length has its checksum."""
    return len(head) >= 12 and _CHECKSUM.unpack(head[8:12])[0] == masked_crc32c(head[:8])


class Reader:
    """One file, a record at a time."""

    def __init__(self, path: Path) -> None:
        """Check the first record.

        Raises:
            DataError: it is none, or has no `input_ids`.
        """
        self._path = path
        first = next(self.sequences(), None)
        held = [] if first is None else [*(("roles",) if first.roles is not None else ())]
        self.facts = Facts(None, None, "int64", notes=tuple(f"records hold {h}" for h in held))

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield the tokens of each record."""
        for place, data in self._records():
            where = f"{self._path}, byte {place}"
            try:
                lists = parse_example(data)
            except MalformedError as error:
                raise damaged(where, f"holds no tf.train.Example: it {error}") from None
            tokens, weights, roles = (lists.get(name) for name in (IDS, WEIGHTS, ROLES))
            if tokens is None or tokens.dtype != np.int64:
                raise damaged(where, f"has no list of integers named {IDS}")
            if weights is not None and weights.dtype != np.float32:
                raise damaged(where, f"has {WEIGHTS} that are no floats")
            if roles is not None and (
                roles.dtype != np.int64 or ((roles < 0) | (roles > SEPARATOR)).any()
            ):
                raise damaged(where, f"has {ROLES} that are not 0, 1, 2 or 3")
            yield TokenSequence(
                tokens,
                None if weights is None else weights_or_none(weights),
                None if roles is None else roles.astype(np.uint8),
            )

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """Place and content of each record, both checksums verified."""
        with self._path.open("rb") as handle:
            size = self._path.stat().st_size
            place = 0
            while place < size:
                yield place, self._record(handle, place, size)
                place = handle.tell()

    def _record(self, handle: BinaryIO, place: int, size: int) -> bytes:
        where = f"{self._path}, byte {place}"
        head = handle.read(12)
        if not recognises(head):
            raise damaged(where, "begins no record: the length has not its checksum")
        (length,) = _LENGTH.unpack(head[:8])
        if length > min(LARGEST_BYTES, size - place - _FRAME_BYTES):
            raise damaged(where, f"claims a record of {length:,} bytes")
        data, tail = handle.read(length), handle.read(4)
        if len(tail) != 4 or _CHECKSUM.unpack(tail)[0] != masked_crc32c(data):
            raise damaged(where, "holds a record that has not its checksum")
        return data


class Writer:
    """SPLIT_0.tfrecord and SPLIT_0.index; further files are counted on."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Begin both files."""
        self._records = OutputFile(folder / f"{split}_{layout.file}.tfrecord")
        self._index = OutputFile(folder / f"{split}_{layout.file}.index")
        self._file = self._records.temporary.open("wb")
        self._records.opened(self._file.close)
        self._lines = self._index.temporary.open("w", encoding="ascii")
        self._index.opened(self._lines.close)

    def append(self, sequence: TokenSequence) -> None:
        """Add one record."""
        lists = {IDS: sequence.tokens}
        if sequence.weights is not None:
            lists[WEIGHTS] = sequence.weights
        if sequence.roles is not None:
            lists[ROLES] = sequence.roles
        data = make_example(lists)
        self._lines.write(f"{self._file.tell()} {len(data) + _FRAME_BYTES}\n")
        length = _LENGTH.pack(len(data))
        for part in (length, _CHECKSUM.pack(masked_crc32c(length))):
            self._file.write(part)
        self._file.write(data)
        self._file.write(_CHECKSUM.pack(masked_crc32c(data)))

    def finish(self) -> list[Path]:
        """Name both files."""
        return [self._index.finish(), self._records.finish()]

    def abandon(self) -> None:
        """Leave nothing."""
        self._records.abandon()
        self._index.abandon()
