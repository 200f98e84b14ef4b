"""The loss on held-out data during training.

The trainer calls `validation_loss`. It must never touch gradients, the optimizer or files.
"""

import torch

from penstock.data.loader import Batch, Loader
from penstock.models.transformer import Transformer


@torch.no_grad()
def validation_loss(model: Transformer, loader: Loader, device: torch.device) -> float:
    """Mean loss in nats per token, by loss weight, over all of an unshuffled loader's samples.

    The last micro-batch is filled up by samples from the start; their weight is set to 0.
    """
    total = torch.zeros((), dtype=torch.float64)
    weight = torch.zeros((), dtype=torch.float64)
    for position in range(0, loader.samples, loader.batch_size):
        for batch in loader.micro_batches(position):
            weights = _without_repeats(batch, loader.samples - position)
            segments = None if batch.segments is None else batch.segments.to(device)
            tokens, targets = batch.tokens.to(device), batch.targets.to(device)
            losses = model.token_losses(tokens, targets, segments)
            total += (losses.cpu().double() * weights).sum()
            weight += weights.sum()
    return float(total / weight.clamp(min=1e-20))


def _without_repeats(batch: Batch, remaining: int) -> torch.Tensor:
    """The batch's loss weights (B, T) float64, 0 for samples past the end of the split."""
    inside = (batch.sequences < remaining).unsqueeze(1)
    return batch.loss_weights.double() * inside
