"""Pages cleaned in a process of their own, with a limit on time and memory for each.

`sources/wikipedia.py` hands pages over, one after another. A page that takes too long, or brings
the parser down, costs that process and nothing else. It must never read a dump.
"""

import contextlib
import json
import os
import resource
import select
import struct
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any, BinaryIO

from penstock.data.sources.wikitext import parse_wikitext
from penstock.errors import ConfigError

_MEMORY_BYTES = 2 << 30
_LENGTH = struct.Struct("<Q")
_LARGEST_ANSWER = 512 << 20
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from penstock.data.sources.page_cleaner import serve_pages; serve_pages()"
)


class CleaningError(Exception):
    """A page that could not be parsed; says why."""


class PageCleaner:
    """A process that parses pages, started at the first and anew after one that ended it.

    Threads may share it. It ends with the process that started it.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds` for each page."""
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def clean(self, text: str, left_out: tuple[str, ...]) -> str:
        """The prose of a page.

        Raises:
            CleaningError: it took too long, or failed.
            ConfigError: the parser is not installed.
        """
        with self._lock:
            return self._clean(text, left_out)

    def _clean(self, text: str, left_out: tuple[str, ...]) -> str:
        try:
            requests, answers = _pipes(self._running())
            _send(requests, {"text": text, "left_out": left_out})
            # The first answer takes the start of the process too.
            if not select.select([answers], [], [], self._seconds)[0]:
                raise CleaningError("took too long")
            answer = _receive(answers)
        except (OSError, EOFError, ValueError):
            self.close()
            raise CleaningError("ended the parser") from None
        except CleaningError:
            self.close()
            raise
        if "missing" in answer:
            raise ConfigError(**answer["missing"])
        if "text" not in answer:
            raise CleaningError(str(answer.get("error")))
        return str(answer["text"])

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(  # noqa: S603 - this Python, our own module
                [sys.executable, "-c", _PROGRAM, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            # Its start is not the first page's time.
            _send(_pipes(self._process)[0], {"text": "", "left_out": []})
            _receive(_pipes(self._process)[1])
        return self._process

    def __enter__(self) -> "PageCleaner":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[BinaryIO, BinaryIO]:
    pipes: Any = (process.stdin, process.stdout)
    return pipes


def _send(pipe: BinaryIO, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> dict[str, Any]:
    """One message.

    Raises:
        EOFError: the other side has ended, or claims too much.
    """
    head = pipe.read(_LENGTH.size)
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else _LARGEST_ANSWER + 1
    if length > _LARGEST_ANSWER:
        raise EOFError
    data = pipe.read(length)
    if len(data) != length:
        raise EOFError
    return json.loads(data)


def serve_pages() -> None:
    """Clean each page that comes on standard input, until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for limit, value in ((resource.RLIMIT_DATA, _MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
            resource.setrlimit(limit, (value, value))
    with contextlib.suppress(EOFError):
        while True:
            request = _receive(sys.stdin.buffer)
            _send(answers, _answer(request))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"text": parse_wikitext(request["text"], request["left_out"])}
    except ConfigError as error:
        return {"missing": {"what": error.what, "where": error.where, "do": error.do}}
    except Exception as error:  # the parser's own errors, recursion, memory
        return {"error": f"{type(error).__name__}: {error}"[:200]}
