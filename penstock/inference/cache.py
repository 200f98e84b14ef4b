"""The static key-value cache of one batch of prompts, and where each place of it may look.

`inference/decoding.py` keeps one per batch. It must never know about text or tokens.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from penstock.models.transformer import Transformer


class Cache:
    """Per block, keys and values (B, K, `capacity`, S) in the model's dtype."""

    def __init__(self, model: Transformer, rows: int, capacity: int) -> None:
        """Zeroed, for `rows` prompts."""
        a = model.architecture
        shape = (a.layers, 2, rows, a.heads // a.group_size, capacity, a.head_size)
        self._tensor = model.embed.tokens.weight.new_zeros(shape)

    def first(
        self, layer: int, length: int
    ) -> tuple[Float[Tensor, "B K L S"], Float[Tensor, "B K L S"]]:
        """Views of the first `length` places of one block, each (B, K, length, S)."""
        keys, values = self._tensor[layer, :, :, :, :length]
        return keys, values

    def store(
        self,
        layer: int,
        start: int,
        keys: Float[Tensor, "B K T S"],
        values: Float[Tensor, "B K T S"],
    ) -> None:
        """Put a block's keys and values (B, K, T, S) at places from `start` on."""
        end = start + keys.shape[2]
        self._tensor[layer, 0, :, :, start:end] = keys
        self._tensor[layer, 1, :, :, start:end] = values


def attention_mask(
    start: int, count: int, columns: int, padding: Int[Tensor, " B"]
) -> Bool[Tensor, "B 1 T LT"]:
    """Where `count` new places from `start` on may look, (B, 1, count, columns + count) bool.

    The first `columns` are cache places, of which only those before `start` hold anything; then
    come the new places. Each sees itself and the earlier places that are no padding; padding (B,)
    counts the places before each prompt.
    """
    new = torch.arange(start, start + count, device=padding.device)
    cached = torch.arange(columns, device=padding.device)
    places = torch.cat([cached, new])
    held = torch.cat([cached < start, torch.ones_like(new, dtype=torch.bool)])
    earlier = held & (places <= new.unsqueeze(1))  # (T, L+T)
    real = places >= padding.view(-1, 1, 1)  # (B, 1, L+T)
    itself = torch.arange(columns + count, device=padding.device) == columns + (
        new - start
    ).unsqueeze(1)
    return (earlier & real | itself).unsqueeze(1)
