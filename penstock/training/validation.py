"""The loss on held-out data during training.

The trainer calls `validate`. It must never touch gradients, the optimizer or files.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from penstock.data.loader import Batch, Loader
from penstock.parallel.mesh import Peers
from penstock.parallel.replicas import Replicas
from penstock.parallel.world import World
from penstock.training.step import Passes

if TYPE_CHECKING:  # It loads torch's pipelines.
    from penstock.parallel.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Validation:
    """Held-out samples of one dataset."""

    name: str
    """Member of the mixture they belong to; empty where there is only one dataset."""
    weight: float
    """Its part in the validation loss."""
    loader: Loader


def validate(
    passes: "Passes | Pipeline", parts: Sequence[Validation], replicas: Replicas, world: World
) -> tuple[float, dict[str, float]]:
    """Mean loss over the parts by their weights, and the loss of each named part."""
    losses = [validation_loss(passes, part.loader, replicas.peers, world) for part in parts]
    weight = sum(part.weight for part in parts)
    total = sum(p.weight * loss for p, loss in zip(parts, losses, strict=True) if p.weight)
    named = {p.name: loss for p, loss in zip(parts, losses, strict=True) if p.name}
    return (total / weight if weight else losses[0]), named


@torch.no_grad()
def validation_loss(
    passes: "Passes | Pipeline", loader: Loader, replicas: Peers, world: World
) -> float:
    """Mean loss in nats per token, by loss weight, over one epoch of a loader's samples.

    Replicas take turns, as many each: past the end, and to fill up the last micro-batch, are
    samples from the start, whose weight is set to 0.
    """
    total = torch.zeros(2, dtype=torch.float64)
    turn = loader.batch_size * passes.at_once
    for start in range(0, loader.epoch, turn * replicas.size):
        first = start + replicas.rank * turn
        positions = range(first, first + turn, loader.batch_size)
        batches = [(batch, at) for at in positions for batch in loader.micro_batches(at)]
        found = passes.token_losses([batch for batch, _ in batches])
        # Of several stages only the last one has any.
        for losses, (batch, at) in zip(found, batches, strict=False):
            weights = _without_repeats(batch, loader.epoch - at)
            total += torch.stack([(losses.cpu().double() * weights).sum(), weights.sum()])
    loss, weight = world.sum(total)
    return float(loss / weight.clamp(min=1e-20))


def _without_repeats(batch: Batch, remaining: int) -> torch.Tensor:
    """The batch's loss weights (B, T) float64, 0 for samples past the end of the split."""
    inside = (batch.sequences < remaining).unsqueeze(1)
    return batch.loss_weights.double() * inside
