"""JSON lines of token ids: an array a line, or an object with `input_ids` and what weighs them.

`registry.py` hands it files to read and splits to write. It must never hold more than a line.
Source: ours; names as in `columns.py`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.data.formats.columns import IDS, ROLES, USED, WEIGHTS, find_ids, to_sequence
from penstock.data.formats.output import OutputFile
from penstock.data.formats.sequence import Facts, Layout, TokenSequence, damaged

_LARGEST_LINE = 64 << 20


def recognises(line: bytes) -> bool:
    """Whether a first line is an array of integers or an object with token ids."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if isinstance(value, dict):
        name = find_ids(value)
        value = value[name] if name else None
    return isinstance(value, list) and all(type(item) is int for item in value)


class Reader:
    """One file, a line at a time."""

    def __init__(self, path: Path) -> None:
        """Check the first line.

        Raises:
            DataError: it holds no token ids.
        """
        self._path = path
        next(self.sequences(), None)
        self.facts = Facts(None, None, "JSON integers")

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield the tokens of each line; empty lines are passed over."""
        with self._path.open("rb") as handle:
            number = 0
            while line := handle.readline(_LARGEST_LINE + 1):
                number += 1
                where = f"{self._path}:{number}"
                if len(line) > _LARGEST_LINE:
                    raise damaged(where, "is a line of more than 64 MiB")
                if line.strip():
                    yield _parse(line, where)


def _parse(line: bytes, where: str) -> TokenSequence:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"is not JSON ({type(error).__name__})", "mend the line") from None
    if isinstance(value, list):
        value = {IDS: value}
    if not isinstance(value, dict) or find_ids(value) is None:
        raise damaged(where, "has neither an array of token ids nor input_ids", "mend the line")
    columns = {name: _array(items, where, name) for name, items in value.items() if name in USED}
    return to_sequence(columns, where)


def _array(items: object, where: str, name: str) -> NDArray[Any]:
    """Numbers of one list; only weights may be other than integers."""
    kinds = (int, float) if name == WEIGHTS else (int,)
    if isinstance(items, list) and all(type(item) in kinds for item in items):
        try:
            return np.array(items, np.float32 if name == WEIGHTS else np.int64)
        except OverflowError:
            pass
    raise damaged(where, f"has {name} that are no list of numbers in range", "mend the line")


class Writer:
    """SPLIT.jsonl: an object a line."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """Begin the file."""
        self._output = OutputFile(folder / f"{split}.jsonl")
        self._file = self._output.temporary.open("w", encoding="ascii")
        self._output.opened(self._file.close)

    def append(self, sequence: TokenSequence) -> None:
        """Add one line."""
        value: dict[str, list[Any]] = {IDS: sequence.tokens.tolist()}
        if sequence.weights is not None:
            value[WEIGHTS] = sequence.weights.tolist()
        if sequence.roles is not None:
            value[ROLES] = sequence.roles.tolist()
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")

    def finish(self) -> list[Path]:
        """Name the file."""
        return [self._output.finish()]

    def abandon(self) -> None:
        """Leave nothing."""
        self._output.abandon()
