"""A checkpoint that several processes write: each its own files, the first the rest.

`checkpoint.py` calls it. Processes meet in the folder itself, so that a checkpoint is written
while training goes on and no collective of it can be in another's way. It must never know tensors.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.errors import CheckpointError

MAKE_ROOM = "make room and start again with the same command; what was saved before is whole"
"""What to do about a checkpoint that could not be written."""
_POLL_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Part:
    """Which of a checkpoint's parts a process writes."""

    index: int = 0
    count: int = 1
    token: str = ""
    """Equal in all processes of one start of a job, and in no other."""
    timeout_seconds: float = 600.0
    """Longest wait of a process for another; the first waits half as long for their files."""
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


def give_up(folder: Path, part: Part, reason: str) -> None:
    """Say that a process other than the first cannot write its files, if that much can be said."""
    failed = folder / _failed(part.index)
    with contextlib.suppress(OSError):
        failed.touch()  # A name finds room where a text may not.
        failed.write_text(reason, encoding="utf-8")


def collect(folder: Path, part: Part) -> dict[str, Any]:
    """What all other processes wrote, waiting for them; their notes are gone then.

    Raises:
        CheckpointError: one could not write its files, or has not in time.
    """
    files: dict[str, Any] = {}
    # The others, who wait for this process then, must not give it up first.
    deadline = time.monotonic() + part.timeout_seconds / 2
    for index in range(1, part.count):
        note = folder / _note(index)
        while not note.is_file():
            failed = folder / _failed(index)
            if failed.is_file():
                reason = failed.read_text(encoding="utf-8") or "it could not say why"
                raise CheckpointError(
                    "the checkpoint could not be written: process "
                    f"{index + 1} of {part.count}: {reason}",
                    where=str(folder),
                    do=MAKE_ROOM,
                )
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"process {index + 1} of {part.count} has not written its part of a checkpoint",
                    where=str(folder),
                    do="use a run folder that all hosts share; what was saved before is whole",
                )
            time.sleep(_POLL_SECONDS)
        files |= json.loads(note.read_bytes())
        note.unlink()
    return files


def _note(index: int) -> str:
    return f"part-{index:05}.json"


def _failed(index: int) -> str:
    return f"part-{index:05}.failed"


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
