"""Files written so that nothing is ever half there.

Every layer that writes goes through here: temporary name, fsync, rename, fsync of the folder. It
knows nothing about what the files mean.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Any

from penstock.errors import DataError

_HASH_CHUNK_BYTES = 1 << 22


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of `path` durable."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


@contextlib.contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; it takes `path`'s place only on success.

    The caller creates the temporary file. On any exception it is removed and `path` is as before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replace the content of `path` by `data` (text as UTF-8), or leave it untouched."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


class LineLog:
    """Appends lines to a file. What a full disk has no room for is kept, and written when there is
    room again: no line is lost, and none is torn by it.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending; `OSError` where that cannot be."""
        # Unbuffered: a line is with the system, safe from a kill, when `append` returns.
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._told = False

    def append(self, line: str) -> str | None:
        """Write a line, after those that still wait; why it has to wait, as `untold` has it."""
        self._waiting += f"{line}\n".encode()
        try:
            self._write()
        except OSError as error:
            return self.untold(error)
        self._told = False
        return None

    def untold(self, error: OSError) -> str | None:
        """Why lines have to wait, once until all are written."""
        told, self._told = self._told, True
        return None if told else error.strerror

    def sync(self) -> None:
        """Make all lines safe from a power cut; `OSError` where one cannot be written."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closing twice is fine."""
        self._file.close()

    def _write(self) -> None:
        while self._waiting:  # A part of it where there is room for no more.
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while chunk := handle.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return JSON with sorted keys and no NaN, the same text for equal values."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def read_json(path: str | Path) -> Any:  # noqa: ANN401 - any JSON value
    """Return the JSON value in a file; `DataError` when it is missing or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", where=str(path), do="check the path") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON: {error}", where=str(path), do="write it anew"
        ) from None


def whole_records(path: Path, key: str) -> list[dict[str, Any]]:
    """Objects of a log of JSON lines that have an integer under `key`; none where there is no file.

    Lines that a killed process left half written are passed over.
    """
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get(key)) is int:
            records.append(record)
    return records
