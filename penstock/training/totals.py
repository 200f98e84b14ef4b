"""Where a run stands: counters and best figures.

The trainer keeps them and every checkpoint holds them. It must never know how they are reached.
"""

import dataclasses


@dataclasses.dataclass
class Totals:
    """Where a run stands; every checkpoint holds it."""

    step: int = 0
    position: int = 0
    """Samples taken from the loader, over all epochs."""
    tokens: int = 0
    seconds: float = 0.0
    """Time spent in this run, over all resumes."""
    best_loss: float | None = None
    """Lowest validation loss so far."""
    last_loss: float | None = None
    """Training loss of the last step that was applied."""
    reached_target: bool = False
    without_improvement: int = 0
    """Validations since the lowest loss."""
    lost_patience: bool = False
    failed_saves: int = 0
    """Checkpoints that could not be written, over all resumes."""

    @property
    def has_stopped(self) -> bool:
        """Whether the validation loss has ended the run early."""
        return self.reached_target or self.lost_patience
