"""Self-attention: projections, the choice of kernel, and the decoding path.

`models/transformer.py` builds it into blocks. It must never know about batches of data or caches'
owners; it is handed the cache's tensors.
"""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from penstock.models.architecture import Architecture
from penstock.models.blockwise import allowed, blockwise_attention
from penstock.models.layers import dropout
from penstock.models.projection import Projection
from penstock.models.rotary import rotate

_attention_of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_as_one: ContextVar[bool] = ContextVar("attention as one operator", default=False)


@contextlib.contextmanager
def attention_as_one() -> Generator[None]:
    """Have attention on CPUs call ATen's operator inside, for compilers that have their own for it:
    as machine code, `blockwise_attention` is faster than ATen's.
    """
    token = _as_one.set(True)
    try:
        yield
    finally:
        _as_one.reset(token)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., arXiv 1706.03762, §3.2), with keys and values
    shared by groups of heads where the architecture says so (Ainslie et al., arXiv 2305.13245).
    """

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: query_key_value (D + 2·K·S, D), rows query, key, value; output (D, D)."""
        super().__init__()
        hidden_size, bias = architecture.hidden_size, architecture.attention_bias
        self.heads = architecture.heads
        self.group_size = architecture.group_size
        self.rotary_pairs = architecture.rotary_pairs
        self.is_causal = architecture.is_causal
        self.attention_rate = architecture.attention_rate
        self.residual_rate = architecture.dropout
        rows = hidden_size + 2 * architecture.kv_size
        self.query_key_value = Projection(
            architecture, "attention.query_key_value", hidden_size, rows, bias=bias
        )
        self.output = Projection(
            architecture, "attention.output", hidden_size, hidden_size, bias=bias
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        keys: Int[Tensor, "B sites"] | None = None,
        turns: Float[Tensor, "2 #B 1 T P"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """X (B, T, D) → (B, T, D); keys (B, sites) int64 drop probabilities, outputs and what
        adapters are given; turns (2, B or 1, 1, T, P) float32 is the rotation of rotary positions;
        segments (B, T) int64: positions with different numbers do not see each other.
        """
        query, key, value = self._heads(x, turns, keys)
        if self.group_size > 1:
            key, value = (self._for_each_query(shared) for shared in (key, value))
        if keys is not None and self.attention_rate > 0:
            mixed = self._dropping_attention(query, key, value, keys[:, 0], segments)
        elif x.is_cuda:
            mask = self._mask(segments, x.shape[1])
            mixed = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=self.is_causal and mask is None
            )
        elif segments is None and _as_one.get():
            mixed = _attention_of_cpu(query, key, value, 0.0, self.is_causal)[0]
        else:
            mixed = blockwise_attention(query, key, value, segments, is_causal=self.is_causal)
        result = self.output(mixed.transpose(1, 2).flatten(2), keys)  # (B, T, D)
        return result if keys is None else dropout(result, keys[:, 1], self.residual_rate)

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        cache_keys: Float[Tensor, "B K L S"],
        cache_values: Float[Tensor, "B K L S"],
        mask: Bool[Tensor, "B 1 T L+T"],
        turns: Float[Tensor, "2 B 1 T P"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B K T S"], Float[Tensor, "B K T S"]]:
        """Attend from T new positions to L cached ones and to themselves.

        x (B, T, D); cache_keys and cache_values (B, K, L, S); mask (B, 1, T, L+T) bool is true
        where attention is allowed, cached positions first; turns (2, B, 1, T, P) float32 rotates
        the new positions. Returns the result (B, T, D), and the new positions' keys and values
        (B, K, T, S) for the caller to cache.
        """
        query, key, value = self._heads(x, turns)
        query = query * query.shape[3] ** -0.5
        if self.group_size > 1:
            # A group's queries are rows of one product, which reads the shared keys once.
            query = query.unflatten(1, (-1, self.group_size)).flatten(2, 3)  # (B, K, G·T, S)
            mask = mask.repeat(1, 1, self.group_size, 1)
        # Cached and new positions apart: one tensor for both scores costs more than all else.
        length = cache_keys.shape[2]
        cached = _masked(query @ cache_keys.transpose(2, 3), mask[..., :length])  # (B, K, G·T, L)
        new = _masked(query @ key.transpose(2, 3), mask[..., length:])  # (B, K, G·T, T)
        largest = new.amax(-1, keepdim=True)  # finite: each position sees itself
        if length > 0:
            largest = torch.maximum(largest, cached.amax(-1, keepdim=True))
        cached, new = torch.exp(cached - largest), torch.exp(new - largest)
        total = cached.sum(-1, keepdim=True) + new.sum(-1, keepdim=True)
        mixed = (cached.to(x.dtype) @ cache_values).float() + (new.to(x.dtype) @ value).float()
        mixed = (mixed / total).to(x.dtype)
        if self.group_size > 1:
            mixed = mixed.unflatten(2, (self.group_size, -1)).flatten(1, 2)  # (B, H, T, S)
        return self.output(mixed.transpose(1, 2).flatten(2)), key, value

    def _heads(
        self,
        x: Float[Tensor, "B T D"],
        turns: Float[Tensor, "2 #B 1 T P"] | None,
        keys: Int[Tensor, "B sites"] | None = None,
    ) -> tuple[Float[Tensor, "B H T S"], Float[Tensor, "B K T S"], Float[Tensor, "B K T S"]]:
        """Query (B, H, T, S), key and value (B, K, T, S), in their places."""
        projected = self.query_key_value(x, keys)
        if self.group_size == 1:
            parts = projected.unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, S)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
        else:
            shared = self.heads // self.group_size
            parts = projected.unflatten(-1, (self.heads + 2 * shared, -1)).transpose(1, 2)
            query, key, value = parts.split([self.heads, shared, shared], 1)
        if turns is None:
            return query, key, value
        query, key = (rotate(heads, turns, self.rotary_pairs) for heads in (query, key))
        return query, key, value

    def _for_each_query(self, shared: Float[Tensor, "B K T S"]) -> Float[Tensor, "B H T S"]:
        """Keys or values (B, K, T, S), repeated for every head of a group: (B, H, T, S)."""
        repeated = shared.unsqueeze(2).expand(-1, -1, self.group_size, -1, -1)
        return repeated.flatten(1, 2)

    def _dropping_attention(
        self,
        query: Float[Tensor, "B H T S"],
        key: Float[Tensor, "B H T S"],
        value: Float[Tensor, "B H T S"],
        dropout_key: Int[Tensor, " B"],
        segments: Int[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B H T S"]:
        """Attention with dropped probabilities, (B, H, T, S); the scores exist whole here."""
        scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)  # (B, H, T, T)
        mask = self._mask(segments, query.shape[2])
        if mask is None and self.is_causal:
            column = torch.arange(query.shape[2], device=query.device)
            mask = column <= column.unsqueeze(1)
        scores = scores.float() if mask is None else _masked(scores, mask)
        weights = torch.softmax(scores, -1).to(query.dtype)
        return dropout(weights, dropout_key, self.attention_rate) @ value

    def _mask(
        self, segments: Int[Tensor, "B T"] | None, length: int
    ) -> Bool[Tensor, "B 1 T T"] | None:
        """Where attention is allowed by segments, and by order in causal models."""
        if segments is None:
            return None
        places = slice(0, length)
        return allowed(segments, places, length, is_causal=self.is_causal).unsqueeze(1)


def _masked(scores: Float[Tensor, "B H T N"], mask: Bool[Tensor, "... T N"]) -> Tensor:
    """Scores in float32, minus infinity where attention is not allowed."""
    return torch.where(mask, scores.float(), float("-inf"))
