"""The loss on held-out data during training.

The trainer calls `validation_loss`. It must never touch gradients, the optimizer or files.
"""

import torch

from penstock.data.loader import Batch, Loader
from penstock.models.transformer import Transformer
from penstock.parallel.world import World


@torch.no_grad()
def validation_loss(
    model: Transformer, loader: Loader, device: torch.device, world: World
) -> float:
    """Mean loss in nats per token, by loss weight, over all of an unshuffled loader's samples.

    Processes take turns, as many each: past the end, and to fill up the last micro-batch, are
    samples from the start, whose weight is set to 0.
    """
    total = torch.zeros(2, dtype=torch.float64)
    stride = loader.batch_size * world.size
    for first in range(0, loader.samples, stride):
        position = first + world.rank * loader.batch_size
        for batch in loader.micro_batches(position):
            weights = _without_repeats(batch, loader.samples - position)
            losses = model.token_losses(batch.tokens.to(device), batch.targets.to(device))
            total += torch.stack([(losses.cpu().double() * weights).sum(), weights.sum()])
    loss, weight = world.sum(total)
    return float(loss / weight.clamp(min=1e-20))


def _without_repeats(batch: Batch, remaining: int) -> torch.Tensor:
    """The batch's loss weights (B, T) float64, 0 for samples past the end of the split."""
    inside = (batch.sequences < remaining).unsqueeze(1)
    return batch.loss_weights.double() * inside
