"""Checkpoints: folders that appear whole or not at all, verified by checksum, written aside.

The trainer saves `CheckpointState`s through `AsyncSaver`; everybody loads by `load_newest`. It
must never know what the tensors mean. Only safetensors and JSON are ever read.

Layout: FOLDER/step-00000100/{tensors.safetensors, state.json, manifest.json}; the manifest, with
size and SHA-256 of the others, is written last; the folder is then renamed into place.
"""

import concurrent.futures
import dataclasses
import errno
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from penstock.console import get_console
from penstock.errors import CheckpointError
from penstock.files import atomic_write, fsync_file, fsync_folder, sha256_file

_TENSORS, _STATE, _MANIFEST, _BEST = (
    "tensors.safetensors",
    "state.json",
    "manifest.json",
    "best.json",
)
_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class CheckpointState:
    """Everything needed to go on exactly."""

    step: int
    tensors: dict[str, Tensor]
    """By name; "master.NAME" are the float32 weights."""
    values: dict[str, Any]
    """Plain JSON values."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.name.startswith("step-") and path.is_dir()
    )


def save_checkpoint(folder: Path, state: CheckpointState) -> Path:
    """Write one checkpoint; returns its folder.

    Raises:
        CheckpointError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    final = folder / f"step-{state.step:08}"
    temporary = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        safetensors.torch.save_file(
            {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()},
            temporary / _TENSORS,
        )
        fsync_file(temporary / _TENSORS)
        atomic_write(temporary / _STATE, json.dumps({"step": state.step, **state.values}))
        manifest = {
            name: {
                "sha256": sha256_file(temporary / name),
                "bytes": (temporary / name).stat().st_size,
            }
            for name in (_TENSORS, _STATE)
        }
        content = json.dumps({"format_version": _FORMAT_VERSION, "files": manifest})
        atomic_write(temporary / _MANIFEST, content)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_folder(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _readable(error, folder) from error
    return final


def _readable(error: BaseException, folder: Path) -> BaseException:
    """A full or read-only disk as one line; anything else as it is."""
    full = "No space left" in str(error) or "os error 28" in str(error)
    if isinstance(error, OSError) or full:
        full = full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return CheckpointError(
            f"the checkpoint could not be written: {'the disk is full' if full else error}",
            where=str(folder),
            do="make room and start again with the same command: the last checkpoint is whole",
        )
    return error


def load_checkpoint(path: Path) -> CheckpointState:
    """Read and verify one checkpoint; tensors are on the CPU.

    Raises:
        CheckpointError: missing, truncated or changed.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        if manifest["format_version"] != _FORMAT_VERSION:
            raise CheckpointError(f"{path} has format version {manifest['format_version']}")
        for name in (_TENSORS, _STATE):
            facts = manifest["files"][name]
            if (path / name).stat().st_size != facts["bytes"]:
                raise _damaged(path, f"{name} is truncated")
            if sha256_file(path / name) != facts["sha256"]:
                raise _damaged(path, f"{name} has changed")
        values = json.loads((path / _STATE).read_bytes())
        tensors = safetensors.torch.load_file(path / _TENSORS)
        return CheckpointState(int(values.pop("step")), tensors, values)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {how}", where=str(path), do="use another checkpoint"
    )


def load_newest(folder: Path) -> CheckpointState | None:
    """The newest checkpoint that is whole; damaged newer ones are passed over, and it says so.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            get_console().warning(f"{error.what}; using the checkpoint before it")
            continue
        return state
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints is whole",
            where=str(folder),
            do="restore one from a copy, or start a new run folder",
        )
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, if one was noted and still exists."""
    try:
        name = str(json.loads((folder / _BEST).read_bytes())["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    path = folder / Path(name).name
    return path if path.is_dir() else None


class AsyncSaver:
    """Writes checkpoints in a thread from a copy taken at the call; one at a time.

    A failed write is raised by the next call.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Keep the newest `keep` checkpoints and the best."""
        self.folder = folder
        self._keep = keep
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        for leftover in folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, state: CheckpointState, *, is_best: bool = False, wait: bool = False) -> None:
        """Copy the state and write it while the caller goes on; `wait` writes it without a copy."""
        self.wait()
        if wait:
            self._write(state, is_best)
            return
        for name, tensor in state.tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None:
                buffer = self._buffers[name] = torch.empty_like(tensor, device="cpu")
            buffer.copy_(tensor)
        values = json.loads(json.dumps(state.values))
        copied = CheckpointState(state.step, dict(self._buffers), values)
        self._writing = self._thread.submit(self._write, copied, is_best)

    def wait(self) -> None:
        """Return when nothing is being written; raises what went wrong in the last write."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, state: CheckpointState, is_best: bool) -> None:
        path = save_checkpoint(self.folder, state)
        if is_best:
            atomic_write(self.folder / _BEST, json.dumps({"checkpoint": path.name}))
        kept = {*list_checkpoints(self.folder)[-self._keep :], best_checkpoint(self.folder)}
        for old in list_checkpoints(self.folder):
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
