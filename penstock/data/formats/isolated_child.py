"""The process that reads HDF5, Arrow and Parquet, whose libraries a crafted file can bring down.

`isolation.py` starts it and asks; one request a line on standard input, one message on standard
output for each. It has limits on memory and can write no file. It must never be imported by
anything else.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from penstock.data.formats import arrow, arrow_records, cerebras, sambanova
from penstock.data.formats.frames import pack, write_message
from penstock.data.formats.hdf5 import dataset_names
from penstock.data.formats.sequence import Joined, Reader, TokenSequence
from penstock.errors import DataError

_MEMORY_BYTES = 4 << 30
_BATCH_ROWS, _BATCH_TOKENS = 4096, 1 << 18
_READERS: dict[str, Callable[[Sequence[Path]], Reader]] = {
    "sambanova": lambda paths: Joined([sambanova.Reader(path) for path in paths]),
    "cerebras": cerebras.Reader,
    "table": lambda paths: Joined([arrow.Reader(path) for path in paths]),
}


def main() -> None:
    """Serve until standard input ends."""
    # Libraries may print to standard output, which only messages may use.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for limit, value in ((resource.RLIMIT_DATA, _MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
            resource.setrlimit(limit, (value, value))
    # Pipes are no files: what is left is every way to write one.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    serve(sys.stdin.buffer, answers)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer each request."""
    running: dict[int, Iterator[Any]] = {}
    for line in requests:
        request = json.loads(line)
        try:
            _answer(request, running, answers)
        except DataError as error:
            write_message(answers, {"error": [error.what, error.where, error.do]})
        except MemoryError:
            write_message(answers, {"error": ["the file needs too much memory", None, None]})


def _answer(request: dict[str, Any], running: dict[int, Iterator[Any]], answers: BinaryIO) -> None:
    do, number = request["do"], request.get("id", 0)
    if do == "names":
        write_message(answers, {"names": sorted(dataset_names(Path(request["path"])))})
    elif do == "groups":
        write_message(answers, {"groups": arrow_records.row_groups(Path(request["path"]))})
    elif do == "next":
        _send_batch(answers, running[number])
    elif do == "close":
        running.pop(number, None)
        write_message(answers, {})
    else:
        reader = _open(request)
        texts = _texts(reader)
        if do == "open":
            facts = dataclasses.asdict(reader.facts)
            write_message(answers, {"facts": facts, "is_text": texts is not None})
            return
        source: Iterable[Any] = (
            reader.sequences() if request["what"] == "sequences" else texts or ()
        )
        running[number] = iter(source)
        write_message(answers, {})


def _open(request: dict[str, Any]) -> Reader:
    paths = [Path(path) for path in request["paths"]]
    if request["kind"] == "records":
        return arrow_records.Reader(paths[0], request["columns"], *request["groups"])
    return _READERS[request["kind"]](paths)


def _texts(reader: Reader) -> Iterator[str] | None:
    """All texts, where the files have text and no token ids."""
    if isinstance(reader, arrow_records.Reader):
        return reader.texts()
    parts = reader.readers if isinstance(reader, Joined) else [reader]
    tables = [part for part in parts if isinstance(part, arrow.Reader) and part.text_column]
    return itertools.chain.from_iterable(t.texts() for t in tables) if tables else None


def _send_batch(answers: BinaryIO, source: Iterator[Any]) -> None:
    """As many items as make a batch; none at the end."""
    batch: list[Any] = []
    size = 0
    while len(batch) < _BATCH_ROWS and size < _BATCH_TOKENS:
        item = next(source, None)
        if item is None:
            break
        batch.append(item.encode() if isinstance(item, str) else item)
        size += len(item.tokens) if isinstance(item, TokenSequence) else len(item)
    if not batch:
        write_message(answers, {"end": True})
    elif isinstance(batch[0], TokenSequence):
        write_message(answers, {}, pack(batch))
    else:
        lengths = np.array([len(text) for text in batch], np.int64)
        joined = np.frombuffer(b"".join(batch), np.uint8)
        write_message(answers, {}, {"lengths": lengths, "text": joined})
