"""One optimizer step, top to bottom: from micro-batches to updated weights.

The trainer calls `train_step`; it must never know about run folders, logging or checkpoints.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from penstock.data.loader import Batch
from penstock.models.transformer import Transformer
from penstock.parallel.deepspeed_engine import EngineModel
from penstock.parallel.replicas import Replicas
from penstock.spans import span
from penstock.training.gradient_norm import global_norm
from penstock.training.guard import Limits
from penstock.training.optimizers import Optimizer

if TYPE_CHECKING:  # It loads torch's pipelines.
    from penstock.parallel.pipeline import Pipeline


class StepResult(NamedTuple):
    """What a step measured, still on the device."""

    loss: Tensor
    """() float32, nats per token: weighted sum over the weights of the whole global batch."""
    grad_norm: Tensor
    """() float32, before clipping."""
    skipped: Tensor
    """() bool: nothing was updated, because a figure was not finite or too large."""


class Passes:
    """Forward and backward of a step's micro-batches, one after the other, by a whole model.

    Gradients are summed in float32 when there are several. `parallel/pipeline.py` has the same
    for a model in stages.
    """

    at_once = 1
    """Micro-batches that `token_losses` takes."""

    def __init__(
        self,
        model: Transformer | EngineModel,
        optimizer: Optimizer,
        replicas: Replicas,
        *,
        z_loss: float,
        accumulation: int,
    ) -> None:
        """`z_loss` is the factor of the log-partition penalty; `accumulation` the micro-batches of
        a step, on each replica.
        """
        self.model, self._optimizer, self._replicas = model, optimizer, replicas
        self.device = next(model.parameters()).device
        self._z_loss = torch.tensor(z_loss, device=self.device)
        self._needs_sums = replicas.needs_sums(accumulation)
        self._sums: list[Tensor] | None = None

    @property
    def models(self) -> Sequence[Transformer]:
        """What runs here: the one model."""
        return [self.model if isinstance(self.model, Transformer) else self.model.transformer]

    def train(self, batches: Sequence[Batch], total: Tensor, *, seed: int, step: int) -> Tensor:
        """Leave the gradients of this replica's share of a step; its loss () float32.

        Loss weights are divided by `total` () float32; `seed` and `step` name the dropout streams.
        """
        model, device = self.model, self.device
        loss = torch.zeros((), device=device)
        for number, batch in enumerate(batches, start=1):
            self._replicas.begin(is_last=number == len(batches))
            tokens, targets = batch.tokens.to(device), batch.targets.to(device)
            weights = batch.loss_weights.to(device) / total
            keys = model.dropout_keys(seed, step, batch.sequences.to(device))
            segments = None if batch.segments is None else batch.segments.to(device)
            part = model(tokens, targets, weights, keys, self._z_loss, segments)
            with span("phase/backward"):
                self._replicas.backward(part)
            self._add()
            loss += part.detach()
        return loss

    def _add(self) -> None:
        """Take in the gradients a backward pass has just left on the parameters."""
        if not self._needs_sums:
            return
        gradients = self._optimizer.gradients()
        if self._sums is None:
            self._sums = [gradient.float() for gradient in gradients]
        else:
            torch._foreach_add_(self._sums, gradients)
        self._optimizer.zero_gradients()

    def gradients(self) -> list[Tensor]:
        """The step's gradients, in the optimizer's order."""
        return self._sums if self._sums is not None else self._optimizer.gradients()

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._sums = None
        self._optimizer.zero_gradients()

    def token_losses(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Each target's negative log-likelihood in nats, (B, T) float32."""
        losses: list[Tensor] = []
        for batch in batches:
            tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
            segments = None if batch.segments is None else batch.segments.to(self.device)
            losses.append(self.model.token_losses(tokens, targets, segments))
        return losses


def train_step(
    passes: "Passes | Pipeline",
    micro_batches: Sequence[Batch],
    optimizer: Optimizer,
    *,
    step: int,
    seed: int,
    lr: float,
    limits: Limits,
    replicas: Replicas,
) -> StepResult:
    """Train on one global batch, of which `micro_batches` is this replica's share.

    `step` and `seed` name the dropout streams; a step whose loss or gradient norm is above
    `limits`, or not finite, changes nothing.
    """
    # 1. The global batch is already cut into micro-batches of the compiled shape.
    # 2. One weight for all: no average of averages, whatever the cut.
    total = torch.stack([batch.loss_weights.sum() for batch in micro_batches]).sum()
    total = replicas.sum(total.to(passes.device)).clamp(min=1e-20)
    # 3. Forward and backward.
    loss = passes.train(micro_batches, total, seed=seed, step=step)
    # 4. Reduce over the replicas; on one device the sum is already global.
    gradients, names = passes.gradients(), optimizer.names
    replicas.reduce(gradients, names)
    loss = replicas.sum(loss)
    # 5. Clip: the optimizer divides by this norm where it is above optimizer.clip.
    with span("phase/gradient norm"):
        counted = replicas.counted(gradients, names)
        norm = replicas.norm(global_norm(counted, passes.device, optimizer.squares))
    # 6. Finite? Decided on the device, without waiting for it.
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    skipped = ~(finite & (loss <= limits.loss) & (norm <= limits.grad_norm))
    # 7. Update.
    with span("phase/optimizer"):
        optimizer.step(lr, grad_norm=norm, skip=skipped, gradients=gradients)
    passes.clear()
    # 8. Measured.
    return StepResult(loss, norm, skipped)
