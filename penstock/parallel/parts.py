"""A checkpoint that several processes write: each its own files, the first the rest.

`checkpoint.py` calls it. Processes meet in the folder itself, so that a checkpoint is written
while training goes on and no collective of it can be in another's way. It must never know tensors.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.errors import CheckpointError

_POLL_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Part:
    """Which of a checkpoint's parts a process writes."""

    index: int = 0
    count: int = 1
    token: str = ""
    """Equal in all processes of one start of a job, and in no other."""
    timeout_seconds: float = 600.0
    """Longest wait of the first process for another's files."""
    blocks: int = 0
    """Which part of its blocks the process holds, where they are divided."""
    cuts: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict[str, Sequence[int]])
    """How, by parameter: a dimension, and the sizes of the whole's sections along it."""

    def file_name(self, name: str) -> str:
        """`model.safetensors`, or as the Hugging Face hub numbers shards."""
        stem, _, ending = name.partition(".")
        if self.count == 1:
            return name
        return f"{stem}-{self.index + 1:05}-of-{self.count:05}.{ending}"


WHOLE = Part()
"""All of a checkpoint, by one process."""


def leave(folder: Path, part: Part, files: dict[str, Any]) -> None:
    """Say that a process other than the first has written its `files`, by name.

    The note is not synced: it is for a process that runs, and with it the folder may be gone.
    """
    begun = folder / f".{_note(part.index)}"
    begun.write_text(json.dumps(files), encoding="utf-8")
    begun.rename(folder / _note(part.index))


def collect(folder: Path, part: Part) -> dict[str, Any]:
    """What all other processes wrote, waiting for them; their notes are gone then.

    Raises:
        CheckpointError: one is not there in time.
    """
    files: dict[str, Any] = {}
    deadline = time.monotonic() + part.timeout_seconds
    for index in range(1, part.count):
        note = folder / _note(index)
        while not note.is_file():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"process {index} of {part.count} has not written its part of a checkpoint",
                    where=str(folder),
                    do="use a run folder that all hosts share; what was saved before is whole",
                )
            time.sleep(_POLL_SECONDS)
        files |= json.loads(note.read_bytes())
        note.unlink()
    return files


def _note(index: int) -> str:
    return f"part-{index:05}.json"


def in_parts(files: dict[str, Any], name: str) -> list[str]:
    """Names of the files that hold `name`, in the order of their rows.

    Raises:
        KeyError: there are none.
        ValueError: some are missing.
    """
    if name in files:
        return [name]
    stem, _, ending = name.partition(".")
    found = sorted(n for n in files if n.startswith(f"{stem}-") and n.endswith(f".{ending}"))
    if not found:
        raise KeyError(name)
    expected = [Part(i, len(found)).file_name(name) for i in range(len(found))]
    if found != expected:
        raise ValueError(f"not all parts of {name} are there")
    return found
