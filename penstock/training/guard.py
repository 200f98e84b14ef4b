"""Whether a step's update may touch the weights: no NaN, no infinity, no spike; when to go back.

The trainer shows every step's loss and gradient norm to the guard before the update. It must
never know where the numbers come from or how an update is skipped.
"""

import math
import struct
from typing import Any

from penstock.config.schema import TrainSection
from penstock.errors import CheckpointError, UserError

_MEMORY = 0.98
"""Weight of the past in the running mean of the gradient norm: about the last 50 steps."""
_HISTORY = 20
"""Applied steps before a spike can be told from the first steps' unrest."""


class TrainingStoppedError(UserError):
    """Too many steps had to be skipped: the job as configured does not train."""


class Guard:
    """Decides step by step and counts what it skipped; its state goes into every checkpoint.

    Source: skipping non-finite steps as in mixed-precision training (arXiv 1710.03740, §3.2);
    skipping spikes by a running mean is ours, after PaLM's skipped batches (arXiv 2204.02311,
    §5.1).
    """

    skipped: int
    """Steps skipped since the run began, over all resumes."""

    def __init__(self, section: TrainSection) -> None:
        """Start with no history; `section` gives `bad_steps` and `spike_factor`."""
        self._bad_steps = section.bad_steps
        self._spike_factor = section.spike_factor
        self._rollback_after = section.rollback_after
        self.skipped = 0
        self._in_a_row = 0
        self._applied = 0
        self._sum = 0.0

    @property
    def mean_norm(self) -> float | None:
        """Running mean of the applied steps' gradient norms, bias-corrected; None before any."""
        if self._applied == 0:
            return None
        return self._sum / (1.0 - _MEMORY**self._applied)

    @property
    def limit(self) -> float:
        """Largest gradient norm the next step may have; infinity while there is no limit.

        A float32 value, so that a device that compares float32 norms with it decides alike.
        """
        mean = self.mean_norm
        if self._spike_factor is None or mean is None or self._applied < _HISTORY:
            return math.inf
        return _as_float32(self._spike_factor * mean)

    def asks_to_roll_back(self) -> bool:
        """Whether so many steps in a row were skipped that the weights themselves are in doubt.

        It asks once, and counts anew then.
        """
        if self._rollback_after is None or self._in_a_row < self._rollback_after:
            return False
        self._in_a_row = 0
        return True

    def admit(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        *,
        limit: float | None = None,
        samples: str = "",
    ) -> bool:
        """Return whether this step's update may be applied, and remember the answer.

        Args:
            step: optimizer step, named in the error.
            loss: the step's loss, in nats per token.
            grad_norm: global gradient norm before clipping.
            limit: the limit the device compared with, when that was an earlier step's because
                results are read late; the limit of now when not given.
            samples: which samples the step took, named in the error.

        Raises:
            TrainingStoppedError: more than `train.bad_steps` steps were skipped.
        """
        limit = self.limit if limit is None else limit
        if math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm <= limit:
            self._sum = _MEMORY * self._sum + (1.0 - _MEMORY) * grad_norm
            self._applied += 1
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        if self.skipped > self._bad_steps:
            raise TrainingStoppedError(
                f"{self.skipped} steps were skipped, the last with loss {loss:g} and gradient"
                f" norm {grad_norm:g} (limit {limit:g})",
                where=", ".join(filter(None, (f"step {step}", samples)))
                + f"; train.bad_steps is {self._bad_steps}",
                do="lower optimizer.lr, lengthen schedule.warmup, or look at the data",
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain JSON values; floats survive JSON exactly."""
        return {
            "skipped": self.skipped,
            "applied": self._applied,
            "sum": self._sum,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the history of `state_dict`; `CheckpointError` when it is not one."""
        try:
            skipped, applied = int(state["skipped"]), int(state["applied"])
            total = float(state["sum"])
            in_a_row = int(state.get("in_a_row", 0))  # Checkpoints from before it was counted.
        except (KeyError, TypeError, ValueError):
            skipped = applied = in_a_row = -1
            total = math.nan
        if min(skipped, applied, in_a_row) < 0 or not math.isfinite(total):
            raise CheckpointError(
                "the guard's history is damaged",
                where="state.json: guard",
                do="resume from another checkpoint",
            )
        self.skipped, self._applied, self._sum = skipped, applied, total
        self._in_a_row = in_a_row


def _as_float32(value: float) -> float:
    """The nearest float32 to a positive number; infinity beyond them all."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
