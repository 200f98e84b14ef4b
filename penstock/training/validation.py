"""The loss on held-out data during training.

The trainer calls `validate`. It must never touch gradients, the optimizer or files.
"""

import dataclasses
from collections.abc import Sequence

import torch

from penstock.data.loader import Batch, Loader
from penstock.models.transformer import Transformer
from penstock.parallel.world import World


@dataclasses.dataclass(frozen=True)
class Validation:
    """Held-out samples of one dataset."""

    name: str
    """Member of the mixture they belong to; empty where there is only one dataset."""
    weight: float
    """Its part in the validation loss."""
    loader: Loader


def validate(
    model: Transformer, parts: Sequence[Validation], device: torch.device, world: World
) -> tuple[float, dict[str, float]]:
    """Mean loss over the parts by their weights, and the loss of each named part."""
    losses = [validation_loss(model, part.loader, device, world) for part in parts]
    weight = sum(part.weight for part in parts)
    total = sum(p.weight * loss for p, loss in zip(parts, losses, strict=True) if p.weight)
    named = {p.name: loss for p, loss in zip(parts, losses, strict=True) if p.name}
    return (total / weight if weight else losses[0]), named


@torch.no_grad()
def validation_loss(
    model: Transformer, loader: Loader, device: torch.device, world: World
) -> float:
    """Mean loss in nats per token, by loss weight, over one epoch of a loader's samples.

    Processes take turns, as many each: past the end, and to fill up the last micro-batch, are
    samples from the start, whose weight is set to 0.
    """
    total = torch.zeros(2, dtype=torch.float64)
    stride = loader.batch_size * world.size
    for first in range(0, loader.epoch, stride):
        position = first + world.rank * loader.batch_size
        for batch in loader.micro_batches(position):
            weights = _without_repeats(batch, loader.epoch - position)
            segments = None if batch.segments is None else batch.segments.to(device)
            tokens, targets = batch.tokens.to(device), batch.targets.to(device)
            losses = model.token_losses(tokens, targets, segments)
            total += torch.stack([(losses.cpu().double() * weights).sum(), weights.sum()])
    loss, weight = world.sum(total)
    return float(loss / weight.clamp(min=1e-20))


def _without_repeats(batch: Batch, remaining: int) -> torch.Tensor:
    """The batch's loss weights (B, T) float64, 0 for samples past the end of the split."""
    inside = (batch.sequences < remaining).unsqueeze(1)
    return batch.loss_weights.double() * inside
