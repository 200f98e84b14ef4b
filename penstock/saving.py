"""Checkpoints written while training goes on, and old ones cleared away.

The trainer saves through `AsyncSaver`; what a checkpoint is, `checkpoint.py` knows.
"""

import concurrent.futures
import json
import shutil
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
from penstock.parallel.parts import WHOLE, Part


class AsyncSaver:
    """Writes checkpoints in a thread from a copy taken at the call; one at a time.

    A failed write is raised by the next call. Only one process may use a folder at a time.
    """

    def __init__(self, folder: Path, keep: int, part: Part = WHOLE) -> None:
        """Keep the newest `keep` checkpoints and the best; clear away what a killed run left."""
        self.folder = folder
        self._keep = keep
        self._part = part
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        for leftover in folder.glob(".step-*.tmp") if part.index == 0 else ():
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, state: CheckpointState, *, is_best: bool = False, wait: bool = False) -> None:
        """Copy the state and write it while the caller goes on; `wait` writes it without a copy.

        Raises:
            CheckpointError: this write, or without `wait` the one before, failed.
        """
        self.wait()
        if wait:
            self._write(state, is_best)
            return
        tensors = {name: self._copy(name, tensor) for name, tensor in state.tensors.items()}
        if any(tensor.is_cuda for tensor in state.tensors.values()):
            torch.cuda.synchronize()
        copied = CheckpointState(state.step, tensors, json.loads(json.dumps(state.values)))
        self._writing = self._thread.submit(self._write, copied, is_best)

    def wait(self) -> None:
        """Return when nothing is being written; raises what went wrong in the last write."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and give thread and buffers back; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._buffers.clear()

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """Begin a copy into a host buffer that stays allocated from save to save."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _write(self, state: CheckpointState, is_best: bool) -> None:
        """Write one checkpoint, then delete those that are no longer wanted."""
        newest = save_checkpoint(self.folder, state, is_best=is_best, part=self._part)
        if self._part.index > 0:
            return
        paths = list_checkpoints(self.folder)
        # Newer ones were damaged, or this run would have gone on from them.
        past = paths[: paths.index(newest) + 1]
        kept = {*past[-self._keep :], best_checkpoint(self.folder), newest}
        for path in paths:
            if path not in kept or path not in past:
                remove_checkpoint(path)
