"""When a run's checkpoints are written, and what becomes of the run when one cannot be.

The trainer asks for saves here; `saving.AsyncSaver` writes. It must never know what is in a state.

Source: a failed save that costs only itself, ours; in PyTorch's own checkpointing a full disk ends
the job.
"""

from collections.abc import Callable
from typing import Literal

import torch

from penstock.checkpoint import CheckpointState
from penstock.console import get_console
from penstock.errors import CheckpointError
from penstock.parallel.parts import MAKE_ROOM
from penstock.parallel.world import World
from penstock.saving import AsyncSaver


class Saves:
    """A run's saves. All processes call the same methods in the same order."""

    def __init__(
        self, saver: AsyncSaver | None, world: World, on_error: Literal["continue", "stop"]
    ) -> None:
        """`saver` is None where another process saves what this one would."""
        self._saver, self._world = saver, world
        self._stops = on_error == "stop"
        self._told: CheckpointError | None = None

    def tell(self) -> None:
        """Say at once what went wrong beside the training, without waiting for any process."""
        error = None if self._saver is None else self._saver.failure()
        if error is not None:
            self._say(error)

    def settle(self) -> bool:
        """Wait until no process writes; whether the save before failed, the same in all of them.

        Raises:
            CheckpointError: it did, and that is to stop the run.
        """
        error = self._wait()
        failed = self._world.sum(torch.tensor(float(error is not None))).item() > 0
        if failed and self._saver is not None:
            self._saver.clear_leftovers()
        if failed and self._stops:
            raise error or CheckpointError(
                "another process could not write its part of a checkpoint",
                where="checkpoint.on_error=stop",
                do=MAKE_ROOM,
            )
        return failed

    def save(self, state: Callable[[], CheckpointState], *, is_best: bool, wait: bool) -> None:
        """Write what `state` returns, beside the training or at once; `settle` comes before it.

        Raises:
            CheckpointError: with `wait`, it could not be written.
        """
        if self._saver is not None:
            self._saver.save(state(), is_best=is_best, wait=wait)

    def _wait(self) -> CheckpointError | None:
        """What went wrong in this process's last write."""
        try:
            if self._saver is not None:
                self._saver.wait()
        except CheckpointError as error:
            self._say(error)
            return error
        return None

    def _say(self, error: CheckpointError) -> None:
        """Once, where it does not end the run."""
        if not self._stops and error is not self._told:
            get_console().warning(f"{error.what} ({error.where}); training goes on without it")
        self._told = error
