"""One optimizer step, top to bottom: from micro-batches to updated weights.

The trainer calls `train_step`; it must never know about run folders, logging or checkpoints.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.data.loader import Batch
from penstock.models.transformer import Transformer
from penstock.parallel.replicas import Replicas
from penstock.spans import span
from penstock.training.gradient_norm import global_norm
from penstock.training.optimizers import Optimizer


class StepResult(NamedTuple):
    """What a step measured, still on the device."""

    loss: Tensor
    """() float32, nats per token: weighted sum over the weights of the whole global batch."""
    grad_norm: Tensor
    """() float32, before clipping."""
    skipped: Tensor
    """() bool: nothing was updated, because a figure was not finite or the norm too large."""


class Accumulator:
    """Gradients summed over micro-batches, in float32 when there are several."""

    def __init__(self, optimizer: Optimizer, *, needs_sums: bool) -> None:
        """`needs_sums`: there are several micro-batches, or replicas, to be summed."""
        self._optimizer = optimizer
        self._needs_sums = needs_sums
        self._sums: list[Tensor] | None = None

    def add(self) -> None:
        """Take in the gradients a backward pass has just left on the parameters."""
        if not self._needs_sums:
            return
        gradients = self._optimizer.gradients()
        if self._sums is None:
            self._sums = [gradient.float() for gradient in gradients]
        else:
            torch._foreach_add_(self._sums, gradients)
        self._optimizer.zero_gradients()

    def total(self) -> list[Tensor]:
        """The step's gradients, in the optimizer's order."""
        return self._sums if self._sums is not None else self._optimizer.gradients()

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._sums = None
        self._optimizer.zero_gradients()


def train_step(
    model: Transformer,
    micro_batches: Sequence[Batch],
    optimizer: Optimizer,
    accumulator: Accumulator,
    *,
    step: int,
    seed: int,
    lr: float,
    norm_limit: float,
    z_loss: Tensor,
    replicas: Replicas,
) -> StepResult:
    """Train on one global batch, of which `micro_batches` is this replica's share.

    `step` and `seed` name the dropout streams; a step whose gradient norm is above `norm_limit`
    or not finite changes nothing. `z_loss` () float32 is the factor of the log-partition penalty.
    """
    # 1. The global batch is already cut into micro-batches of the compiled shape.
    device = z_loss.device
    # 2. One weight for all: no average of averages, whatever the cut.
    total = torch.stack([batch.loss_weights.sum() for batch in micro_batches]).sum()
    total = replicas.sum(total.to(device)).clamp(min=1e-20)
    # 3. Forward and backward.
    loss = torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches, start=1):
        replicas.begin(is_last=number == len(micro_batches))
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        weights = batch.loss_weights.to(device) / total
        keys = model.dropout_keys(seed, step, batch.sequences.to(device))
        segments = None if batch.segments is None else batch.segments.to(device)
        part = model(tokens, targets, weights, keys, z_loss, segments)
        with span("phase/backward"):
            part.backward()
        accumulator.add()
        loss += part.detach()
    # 4. Reduce over the replicas; on one device the sum is already global.
    gradients = accumulator.total()
    replicas.reduce(gradients)
    loss = replicas.sum(loss)
    # 5. Clip: the optimizer divides by this norm where it is above optimizer.clip.
    with span("phase/gradient norm"):
        norm = replicas.norm(global_norm(gradients))
    # 6. Finite? Decided on the device, without waiting for it.
    skipped = ~(torch.isfinite(loss) & torch.isfinite(norm) & (norm <= norm_limit))
    # 7. Update.
    with span("phase/optimizer"):
        optimizer.step(lr, grad_norm=norm, skip=skipped, gradients=gradients)
    accumulator.clear()
    # 8. Measured.
    return StepResult(loss, norm, skipped)
