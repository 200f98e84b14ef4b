"""Back to the weights of the last checkpoint, when too many steps in a row had to be skipped.

The trainer calls it where the guard asks for it; data and step count go on, past what was skipped.

Source: PaLM went back about 100 steps and left out the batches around a spike (arXiv 2204.02311,
§5.1).
"""

from collections.abc import Callable

from penstock.checkpoint import CheckpointState
from penstock.console import get_console
from penstock.training.optimizers import Optimizer


def load_optimizer(optimizer: Optimizer, state: CheckpointState) -> None:
    """Take up a checkpoint's weights, moments and count of steps."""
    optimizer.load_state_tensors(state.tensors)
    optimizer.steps = int(state.values["optimizer_steps"])


def roll_back(optimizer: Optimizer, restore: Callable[[], CheckpointState | None]) -> None:
    """Load what `restore` finds; without a checkpoint, nothing. No process may be writing one.

    Raises:
        CheckpointError: no checkpoint is whole.
    """
    state = restore()
    if state is not None:
        load_optimizer(optimizer, state)
        get_console().warning(f"weights and optimizer are those of step {state.step} again")
