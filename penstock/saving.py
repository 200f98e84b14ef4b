"""Checkpoints copied and written while training goes on, and old ones cleared away.

The trainer saves through `AsyncSaver`; what a checkpoint is, `checkpoint.py` knows.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import itertools
import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from penstock.checkpoint import (
    CheckpointState,
    best_checkpoint,
    list_checkpoints,
    remove_checkpoint,
    save_checkpoint,
)
from penstock.errors import CheckpointError
from penstock.parallel.parts import WHOLE, Part
from penstock.tensors import in_pieces


class AsyncSaver:
    """Writes checkpoints in a thread, from a copy it makes there first; one at a time.

    The state must stay as it is until `wait_for_copy` returns: that is a forward and a backward
    pass, which only read it. A failed write is raised by the next call. Only one process may use a
    folder at a time.
    """

    def __init__(self, folder: Path, keep: int, part: Part = WHOLE) -> None:
        """Keep the newest `keep` checkpoints and the best; clear away what a killed run left."""
        self.folder = folder
        self._keep = keep
        self._part = part
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._saves = 0
        self._copied = threading.Event()
        self._copied.set()
        self.clear_leftovers()

    def clear_leftovers(self) -> None:
        """Remove what killed or failed saves left; no process may be writing."""
        for leftover in self.folder.glob(".step-*.tmp") if self._part.index == 0 else ():
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, state: CheckpointState, *, is_best: bool = False, wait: bool = False) -> None:
        """Write the state while the caller goes on; `wait` writes it at once, without a copy.

        Raises:
            CheckpointError: this write, or without `wait` the one before, failed.
        """
        self.wait()
        if wait:
            self._write(state, is_best)
            return
        values = json.loads(json.dumps(state.values))
        if any(state.tensors[name].is_cuda for name in itertools.islice(state.tensors, 1)):
            # The device's own order of work keeps the copies before the update.
            copies = {name: self._copy(name, tensor) for name, tensor in state.tensors.items()}
            torch.cuda.synchronize()
            copied = CheckpointState(state.step, copies, values)
            self._writing = self._thread.submit(self._write, copied, is_best)
            return
        self._copied.clear()
        todo = CheckpointState(state.step, state.tensors, values)
        self._writing = self._thread.submit(self._copy_and_write, todo, is_best)

    def wait_for_copy(self) -> None:
        """Return when the state that is being saved may change; what went wrong `wait` raises."""
        self._copied.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raises what went wrong in the last write."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def failure(self) -> CheckpointError | None:
        """What went wrong in a write that has ended, and `wait` will raise; it does not wait."""
        if self._writing is None or not self._writing.done():
            return None
        error = self._writing.exception()
        return error if isinstance(error, CheckpointError) else None

    def close(self) -> None:
        """Wait, and give thread and buffers back; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._buffers.clear()

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """Begin a GPU's copy into a host buffer."""
        buffer = self._buffer(name, tuple(tensor.shape), tensor)
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _buffer(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A host buffer that stays allocated from save to save."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape or buffer.dtype != like.dtype:
            buffer = torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[name] = buffer
        return buffer

    def _copy_and_write(self, state: CheckpointState, is_best: bool) -> None:
        """Copy by one thread without the interpreter's lock: cores are busy with the next step."""
        try:
            copies: dict[str, Tensor] = {}
            for name in state.tensors:
                copies[name] = self._copied_in_pieces(name, state.tensors)
        finally:
            self._copied.set()
        self._write(CheckpointState(state.step, copies, state.values), is_best)

    def _copied_in_pieces(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """One tensor's copy, made whole nowhere but in its buffer."""
        shape, parts = in_pieces(tensors, name)
        buffer, place = torch.empty(0), 0
        for part in parts:
            source = part.detach().contiguous()
            buffer = self._buffer(name, shape, source)
            ctypes.memmove(buffer.data_ptr() + place, source.data_ptr(), source.nbytes)
            place += source.nbytes
        return buffer

    def _write(self, state: CheckpointState, is_best: bool) -> None:
        """Write one checkpoint, then clear old ones away."""
        # One step may be saved twice, and a process be at the second while another is at the first.
        self._saves += 1
        token = f"{self._part.token}-{self._saves}" if self._part.token else ""
        part = dataclasses.replace(self._part, token=token)
        newest = save_checkpoint(self.folder, state, is_best=is_best, part=part)
        if self._part.index > 0:
            return
        with contextlib.suppress(OSError):  # What cannot be listed or read now is kept.
            self._clear(newest)

    def _clear(self, newest: Path) -> None:
        """Delete the checkpoints that are no longer wanted."""
        paths = list_checkpoints(self.folder)
        # Newer ones were damaged, or this run would have gone on from them.
        past = paths[: paths.index(newest) + 1]
        kept = {*past[-self._keep :], best_checkpoint(self.folder), newest}
        for path in paths:
            if path not in kept or path not in past:
                remove_checkpoint(path)
