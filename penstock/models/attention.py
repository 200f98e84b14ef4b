"""Causal self-attention: projections, the choice of kernel, and the decoding path.

`models/transformer.py` builds it into blocks. It must never know about batches of data or caches'
owners; it is handed the cache's tensors.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from penstock.models.architecture import Architecture
from penstock.models.blockwise import causal_attention
from penstock.models.layers import dropout


class Attention(nn.Module):
    """Multi-head causal attention (Vaswani et al., arXiv 1706.03762, §3.2), GPT-2's biases."""

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: query_key_value (3D, D), rows query, key, value; output (D, D)."""
        super().__init__()
        hidden_size = architecture.hidden_size
        self.heads = architecture.heads
        self.rate = architecture.dropout
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x: Float[Tensor, "B T D"], keys: Int[Tensor, "B 3"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """X (B, T, D) → (B, T, D); keys (B, 3) int64 drop first probabilities, then outputs."""
        query, key, value = self._heads(x)
        if keys is not None and self.rate > 0:
            mixed = self._dropping_attention(query, key, value, keys[:, 0])
        elif x.is_cuda:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mixed = causal_attention(query, key, value)
        result = self.output(mixed.transpose(1, 2).flatten(2))  # (B, T, D)
        return result if keys is None else dropout(result, keys[:, 1], self.rate)

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        cache_keys: Float[Tensor, "B H L S"],
        cache_values: Float[Tensor, "B H L S"],
        mask: Bool[Tensor, "B 1 T L+T"],
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T S"], Float[Tensor, "B H T S"]]:
        """Attend from T new positions to L cached ones and to themselves.

        x (B, T, D); cache_keys and cache_values (B, H, L, S); mask (B, 1, T, L+T) bool is true
        where attention is allowed, cached positions first. Returns the result (B, T, D), and the
        new positions' keys and values (B, H, T, S) for the caller to cache.
        """
        query, key, value = self._heads(x)
        query = query * query.shape[3] ** -0.5
        # Cached and new positions apart: one tensor for both scores costs more than all else.
        length = cache_keys.shape[2]
        cached = _masked(query @ cache_keys.transpose(2, 3), mask[..., :length])  # (B, H, T, L)
        new = _masked(query @ key.transpose(2, 3), mask[..., length:])  # (B, H, T, T)
        largest = new.amax(-1, keepdim=True)  # finite: each position sees itself
        if length > 0:
            largest = torch.maximum(largest, cached.amax(-1, keepdim=True))
        cached, new = torch.exp(cached - largest), torch.exp(new - largest)
        total = cached.sum(-1, keepdim=True) + new.sum(-1, keepdim=True)
        mixed = (cached.to(x.dtype) @ cache_values).float() + (new.to(x.dtype) @ value).float()
        mixed = (mixed / total).to(x.dtype)
        return self.output(mixed.transpose(1, 2).flatten(2)), key, value

    def _heads(
        self, x: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B H T S"], Float[Tensor, "B H T S"], Float[Tensor, "B H T S"]]:
        """Query, key and value, each (B, H, T, S)."""
        projected = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, S)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        return query, key, value

    def _dropping_attention(
        self,
        query: Float[Tensor, "B H T S"],
        key: Float[Tensor, "B H T S"],
        value: Float[Tensor, "B H T S"],
        dropout_key: Int[Tensor, " B"],
    ) -> Float[Tensor, "B H T S"]:
        """Attention with dropped probabilities, (B, H, T, S); the scores exist whole here."""
        positions = query.shape[2]
        scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)  # (B, H, T, T)
        column = torch.arange(positions, device=query.device)
        earlier = column <= column.unsqueeze(1)
        scores = torch.where(earlier, scores.float(), float("-inf"))
        weights = torch.softmax(scores, -1).to(query.dtype)
        return dropout(weights, dropout_key, self.rate) @ value


def _masked(scores: Float[Tensor, "B H T N"], mask: Bool[Tensor, "B 1 T N"]) -> Tensor:
    """Scores in float32, minus infinity where attention is not allowed."""
    return torch.where(mask, scores.float(), float("-inf"))
