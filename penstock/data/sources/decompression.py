"""Bytes of a file, plain or compressed, in chunks of bounded size.

`sources/reading.py` and `sources/dump.py` read through it. It must never know what the bytes mean.
Compression is recognised by a file's first bytes: gzip (RFC 1952), bzip2, xz, Zstandard (RFC 8878).
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

import zstandard

from penstock.errors import DataError

READ_BYTES = 1 << 20
_ZSTD_READ_BYTES = 1 << 10
"""Compressed bytes at a time: 4 of them can stand for 128 KiB (RFC 8878, §3.1.1.2)."""
_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
_XZ_MEMORY_BYTES = 256 << 20
"""`xz -9` needs 65 MiB to unpack."""
_SUSPICIOUS_BYTES = 64 << 20
_LARGEST_RATIO = 400
"""What unpacks to more than both is a bomb: text packs to a tenth, seldom to a hundredth."""
_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def compression_of(path: str) -> str | None:
    """gzip, bzip2, xz or zstd, by the file's first bytes; None where it is plain.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as handle:
            magic = handle.read(6)
    except OSError as error:
        raise unreadable(path, error) from None
    names = {_GZIP: "gzip", _BZIP2: "bzip2", _XZ: "xz", _ZSTD: "zstd"}
    return next((name for start, name in names.items() if magic.startswith(start)), None)


def file_bytes(path: str, start: int = 0) -> Iterator[bytes]:
    """The uncompressed bytes from place `start` on.

    Raises:
        DataError: unreadable, damaged or cut short, or a decompression bomb.
    """
    kind = compression_of(path)
    try:
        with Path(path).open("rb") as handle:
            if kind is None:
                handle.seek(start)
                yield from _chunks(handle)
            else:
                limit = max(_SUSPICIOUS_BYTES, Path(path).stat().st_size * _LARGEST_RATIO)
                yield from _from(_limited(_UNPACK[kind](handle), limit, path), start)
    except _ERRORS as error:
        raise unreadable(path, error) from None


def unreadable(path: str, error: Exception) -> DataError:
    """The error for a file that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(f"{path} cannot be read: {reason}", where="source.path", do="check the file")


def _chunks(handle: IO[bytes]) -> Iterator[bytes]:
    while chunk := handle.read(READ_BYTES):
        yield chunk


def _gzip_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(handle) as plain:
        yield from _chunks(plain)  # type: ignore[arg-type]


class _Decoder(Protocol):
    """What bz2 and lzma have in common."""

    @property
    def eof(self) -> bool:
        """Whether the stream's end was reached."""
        ...

    @property
    def needs_input(self) -> bool:
        """Whether more can be unpacked only from more data."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What comes after the end."""
        ...

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Unpack at most `max_length` bytes."""
        ...


def _streams(handle: IO[bytes], decoder: Callable[[], _Decoder], fill: bytes) -> Iterator[bytes]:
    """Streams one after another; `fill` is what may stand between them."""
    data = handle.read(READ_BYTES)
    while data:
        current = decoder()
        while True:
            if plain := current.decompress(data, READ_BYTES):
                yield plain
            data = b""
            if current.eof:
                break
            if current.needs_input:
                data = handle.read(READ_BYTES)
                if not data:
                    raise EOFError("compressed file ends before its end was marked")
        data = current.unused_data.lstrip(fill)
        while not data and (more := handle.read(READ_BYTES)):
            data = more.lstrip(fill)


def _bzip2_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    return _streams(handle, bz2.BZ2Decompressor, b"")


def _xz_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    return _streams(handle, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES), b"\0")


def _zstd_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    """Frames one after another; unlike the library's stream reader it notices a missing end."""
    decoder: zstandard.ZstdDecompressionObj | None = None
    plain = bytearray()
    data = handle.read(_ZSTD_READ_BYTES)
    while data:
        if decoder is None:
            decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        plain += decoder.decompress(data)
        data = b""
        if decoder.eof:
            data, decoder = decoder.unused_data, None
        data = data or handle.read(_ZSTD_READ_BYTES)
        if len(plain) >= READ_BYTES:
            yield bytes(plain)
            plain.clear()
    if decoder is not None:
        raise EOFError("compressed file ends before its end was marked")
    yield bytes(plain)


_UNPACK: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    "gzip": _gzip_chunks,
    "bzip2": _bzip2_chunks,
    "xz": _xz_chunks,
    "zstd": _zstd_chunks,
}


def _limited(chunks: Iterator[bytes], limit: int, path: str) -> Iterator[bytes]:
    """The chunks, until they are more than `limit` bytes."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > limit:
            raise DataError(
                f"{path} unpacks to more than {limit >> 20:,} MiB, {_LARGEST_RATIO} times its size",
                where="source.path",
                do="unpack it yourself if it is meant to",
            )
        yield chunk


def _from(chunks: Iterator[bytes], start: int) -> Iterator[bytes]:
    """What comes from place `start` on."""
    position = 0
    for chunk in chunks:
        if position + len(chunk) > start:
            yield chunk[max(0, start - position) :]
        position += len(chunk)
