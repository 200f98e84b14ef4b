"""Whether a step's update may touch the weights: no NaN, no infinity, no spike; when to go back.

The trainer shows every step's loss and gradient norm to the guard before the update. It must
never know where the numbers come from or how an update is skipped.
"""

import math
import struct
from typing import Any, NamedTuple

from penstock.config.schema import TrainSection
from penstock.errors import CheckpointError, UserError

_MEMORY = 0.98
"""Weight of the past in the running means of loss and gradient norm: about the last 50 steps."""
_HISTORY = 20
"""Applied steps before a spike can be told from the first steps' unrest."""


class TrainingStoppedError(UserError):
    """Too many steps had to be skipped: the job as configured does not train."""


class Limits(NamedTuple):
    """Largest figures with which a step may change the weights; infinity where there is no limit.

    They are float32 values, so that a device that compares float32 figures with them decides alike.
    """

    loss: float
    """In nats per token."""
    grad_norm: float
    """Before clipping."""


NO_LIMITS = Limits(math.inf, math.inf)


class _RunningMean:
    """Exponential mean of the applied steps' figures, bias-corrected."""

    def __init__(self, count: int = 0, total: float = 0.0) -> None:
        """`total` is the weighted sum of `count` figures."""
        self.count, self.total = count, total

    def add(self, figure: float) -> None:
        self.total = _MEMORY * self.total + (1.0 - _MEMORY) * figure
        self.count += 1

    def value(self) -> float | None:
        """None before there is any."""
        return self.total / (1.0 - _MEMORY**self.count) if self.count else None

    def limit(self, factor: float | None) -> float:
        """The factor times the mean; infinity without a factor, or enough history."""
        mean = self.value()
        if factor is None or mean is None or self.count < _HISTORY:
            return math.inf
        return _as_float32(factor * mean)


class Guard:
    """Decides step by step and counts what it skipped; its state goes into every checkpoint.

    Source: skipping non-finite steps as in mixed-precision training (arXiv 1710.03740, §3.2);
    skipping spikes by a running mean is ours, after PaLM's skipped batches (arXiv 2204.02311,
    §5.1).
    """

    skipped: int
    """Steps skipped since the run began, over all resumes."""

    def __init__(self, section: TrainSection) -> None:
        """Start with no history; the section says what a spike is, and how many are too many."""
        self._section = section
        self.skipped = 0
        self._in_a_row = 0
        self._norms, self._losses = _RunningMean(), _RunningMean()

    @property
    def mean_norm(self) -> float | None:
        """Running mean of the applied steps' gradient norms, bias-corrected; None before any."""
        return self._norms.value()

    @property
    def limits(self) -> Limits:
        """What the next step may have."""
        return Limits(
            loss=self._losses.limit(self._section.loss_spike_factor),
            grad_norm=self._norms.limit(self._section.spike_factor),
        )

    def asks_to_roll_back(self) -> bool:
        """Whether so many steps in a row were skipped that the weights themselves are in doubt.

        It asks once, and counts anew then.
        """
        after = self._section.rollback_after
        if after is None or self._in_a_row < after:
            return False
        self._in_a_row = 0
        return True

    def admit(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        *,
        limits: Limits | None = None,
        samples: str = "",
    ) -> bool:
        """Return whether this step's update may be applied, and remember the answer.

        Args:
            step: optimizer step, named in the error.
            loss: the step's loss, in nats per token.
            grad_norm: global gradient norm before clipping.
            limits: those the device compared with, when they were an earlier step's because
                results are read late; those of now when not given.
            samples: which samples the step took, named in the error.

        Raises:
            TrainingStoppedError: more than `train.bad_steps` steps were skipped.
        """
        limits = self.limits if limits is None else limits
        if is_within(limits, loss, grad_norm):
            self._norms.add(grad_norm)
            self._losses.add(loss)
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        allowed = self._section.bad_steps
        if self.skipped > allowed:
            raise TrainingStoppedError(
                f"{self.skipped} steps were skipped, the last with {said(limits, loss, grad_norm)}",
                where=", ".join(filter(None, (f"step {step}", samples)))
                + f"; train.bad_steps is {allowed}",
                do="lower optimizer.lr, lengthen schedule.warmup, or look at the data",
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain JSON values; floats survive JSON exactly."""
        return {
            "skipped": self.skipped,
            "applied": self._norms.count,
            "sum": self._norms.total,
            "losses": self._losses.count,
            "loss_sum": self._losses.total,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the history of `state_dict`; `CheckpointError` when it is not one."""
        try:
            # Checkpoints from before steps in a row, or losses, were counted lack those.
            counts = [int(state[name]) for name in ("skipped", "applied")]
            counts += [int(state.get(name, 0)) for name in ("in_a_row", "losses")]
            sums = [float(state["sum"]), float(state.get("loss_sum", 0.0))]
        except (KeyError, TypeError, ValueError):
            counts, sums = [-1], [math.nan]
        if min(counts) < 0 or not all(map(math.isfinite, sums)):
            raise CheckpointError(
                "the guard's history is damaged",
                where="state.json: guard",
                do="resume from another checkpoint",
            )
        self.skipped, applied, self._in_a_row, losses = counts
        self._norms = _RunningMean(applied, sums[0])
        self._losses = _RunningMean(losses, sums[1])


def is_within(limits: Limits, loss: float, grad_norm: float) -> bool:
    """Whether a step's figures are finite and no spikes."""
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    return finite and loss <= limits.loss and grad_norm <= limits.grad_norm


def said(limits: Limits, loss: float, grad_norm: float) -> str:
    """A step's figures beside what was allowed."""
    bound = "" if math.isinf(limits.loss) else f" (limit {limits.loss:g})"
    return f"loss {loss:g}{bound}, gradient norm {grad_norm:g} (limit {limits.grad_norm:g})"


def _as_float32(value: float) -> float:
    """The nearest float32 to a positive number; infinity beyond them all."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
