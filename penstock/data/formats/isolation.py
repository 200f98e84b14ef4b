"""Readers that work in a process of their own, for formats whose libraries a file can bring down.

`registry.py` opens HDF5, Arrow and Parquet through here: both libraries have aborted on damaged
files, which no `except` can catch. One child process serves this process for as long as it lives,
and is started anew when a file has ended it. It must never believe more of the child than its
messages' own sizes.
"""

import atexit
import itertools
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from penstock.data.formats.frames import read_message, unpack
from penstock.data.formats.sequence import Facts, TokenSequence, damaged
from penstock.errors import DataError

_PATIENCE_SECONDS = 300
"""For one batch; a file that keeps a library busy for longer is given up."""
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from penstock.data.formats.isolated_child import main; main()"
)

_Answer = tuple[dict[str, Any], dict[str, "NDArray[Any]"]]


class _Child:
    """The reading process of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self.generation = 0
        """Raised with each start: what an earlier child had begun is gone."""

    def ask(self, request: dict[str, Any], where: object) -> _Answer:
        """The answer to one request.

        Raises:
            DataError: the child's own, or that the child has ended over it.
        """
        with self._lock:
            requests, answers = self._pipes()
            try:
                requests.write(json.dumps(request).encode() + b"\n")
                requests.flush()
                if not select.select([answers], [], [], _PATIENCE_SECONDS)[0]:
                    raise EOFError
                header, arrays = read_message(answers)
            except (EOFError, OSError):
                raise damaged(where, f"cannot be read: {self._end()}") from None
        if "error" in header:
            what, place, do = header["error"]
            raise DataError(str(what), where=place, do=do)
        return header, arrays

    def _pipes(self) -> tuple[BinaryIO, BinaryIO]:
        """Standard input and output of a living child; a forked process has one of its own."""
        alive = self._process is not None and self._owner == os.getpid()
        if not alive or self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(  # noqa: S603 - this Python, our own module
                [sys.executable, "-c", _PROGRAM, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
            self.generation += 1
        pipes: Any = (self._process.stdin, self._process.stdout)
        return pipes

    def _end(self) -> str:
        """End the child; says how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "there is no process that reads it"
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = 0
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                _close(pipe)
        if code < 0:
            return f"it ends the process that reads it by signal {-code}"
        return "the process that reads it does not answer"

    @property
    def running(self) -> bool:
        """Whether there is a child that could be asked."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End an idle child of this process."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._end()


def _close(pipe: Any) -> None:  # noqa: ANN401 - a binary stream
    """Close a pipe; what is left in its buffer has no reader any more."""
    try:
        pipe.close()
    except OSError:
        return


_child = _Child()
_numbers = itertools.count(1)
atexit.register(_child.stop)


def hdf5_names(path: Path) -> set[str]:
    """Names in the root of an HDF5 file.

    Raises:
        DataError: it is damaged.
    """
    header, _ = _child.ask({"do": "names", "path": str(path.absolute())}, path)
    return set(map(str, header["names"]))


def parquet_groups(path: Path) -> list[int]:
    """Bytes of each row group of a Parquet file.

    Raises:
        DataError: it is damaged, or no Parquet file.
    """
    header, _ = _child.ask({"do": "groups", "path": str(path.absolute())}, path)
    return list(map(int, header["groups"]))


class IsolatedReader:
    """Files of one kind, read by the child, a batch at a time."""

    def __init__(self, kind: str, paths: Sequence[Path], **options: Any) -> None:  # noqa: ANN401 - JSON
        """Open and check the files; `kind` is one the child knows, `options` what it takes.

        Raises:
            DataError: damaged files, or files that bring their reader down.
        """
        names = [str(path.absolute()) for path in paths]
        self._request = {"kind": kind, "paths": names, **options}
        self._where = paths[0]
        header, _ = _child.ask({"do": "open", **self._request}, self._where)
        facts: dict[str, Any] = header["facts"]
        facts["notes"] = tuple(facts["notes"])
        self.facts = Facts(**facts)
        self.is_text = bool(header["is_text"])
        """Whether the files hold text, no token ids."""

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield every sequence.

        Raises:
            DataError: damaged further in.
        """
        for arrays in self._batches("sequences"):
            try:
                yield from unpack(arrays)
            except (EOFError, KeyError):
                raise damaged(self._where, "cannot be read: its reader answers nonsense") from None

    def texts(self) -> Iterator[str]:
        """Yield the text of each row, where the files hold text.

        Raises:
            DataError: damaged further in.
        """
        for arrays in self._batches("texts"):
            data, place = arrays["text"].tobytes(), 0
            for length in arrays["lengths"].tolist():
                yield data[place : place + length].decode("utf-8", "replace")
                place += length

    def _batches(self, what: str) -> Iterator[dict[str, NDArray[Any]]]:
        number = next(_numbers)
        _child.ask({"do": "begin", "id": number, "what": what, **self._request}, self._where)
        generation = _child.generation
        try:
            while True:
                if _child.generation != generation:
                    raise damaged(self._where, "was being read when its reader ended", "try again")
                header, arrays = _child.ask({"do": "next", "id": number}, self._where)
                if "end" in header:
                    return
                yield arrays
        finally:
            if _child.generation == generation and _child.running:
                _child.ask({"do": "close", "id": number}, self._where)
