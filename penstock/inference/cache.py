"""The static key-value cache of one batch of prompts, and where each place of it may look.

`inference/engine.py` makes one per batch; the model writes into it. It must never know about text
or tokens.
"""

import torch
from torch import Tensor

from penstock.models.architecture import Architecture
from penstock.models.transformer import Transformer


def new_cache(model: Transformer, rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Per block, zeroed keys and values (B, H, `length`, S) in the model's dtype."""
    architecture: Architecture = model.architecture
    weight = model.embed.tokens.weight
    shape = (rows, architecture.heads, length, architecture.head_size)
    return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(architecture.layers)]


def attention_mask(places: Tensor, padding: Tensor) -> Tensor:
    """Where each new place may look, (B, 1, T, end) bool: itself, and earlier real tokens.

    places (T,) are consecutive cache places; padding (B,) counts the places before each prompt.
    """
    columns = torch.arange(int(places[-1]) + 1, device=places.device)
    earlier = columns <= places.unsqueeze(1)  # (T, end)
    real = columns >= padding.view(-1, 1, 1)  # (B, 1, end)
    itself = columns == places.unsqueeze(1)
    return (earlier & real | itself).unsqueeze(1)
