"""Attention in blocks of queries, for processors without a fused kernel worth using.

`models/attention.py` calls this on CPU. Measured on a 2-core Zen 4 (GPT-2 124M block, 4 × 512
tokens, bf16): forward and backward of the whole block take 0.89 of the time they take with ATen's
flash attention for CPU, because the scores go through the vendor's batched matrix product and
Inductor fuses the softmax. It must never know about weights, norms or compilation.

In causal models each block of queries attends only to keys up to its own end, so about
(1 + 1/n)/2 of the full square is computed for n blocks. Only the output and the log-sum-exp are
kept for the backward pass, which computes the scores again (FlashAttention, arXiv 2205.14135,
algorithm 4).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

QUERY_BLOCK = 256
"""Queries per block; 128 and 512 were slower at T = 512 on the machine above."""


def blockwise_attention(
    query: Float[Tensor, "B H T S"],
    key: Float[Tensor, "B H T S"],
    value: Float[Tensor, "B H T S"],
    segments: Int[Tensor, "B T"] | None = None,
    *,
    is_causal: bool = True,
) -> Float[Tensor, "B H T S"]:
    """Softmax attention; query, key and value (B, H, T, S), one float dtype.

    A position sees those with its own number in segments (B, T) int64, all where there are none,
    and in causal models only those not after it. Scores are scaled by 1/sqrt(S), the softmax is
    in float32 (Vaswani et al., arXiv 1706.03762, equation 1).
    """
    shape = query.shape
    rows = (shape[0] * shape[1], shape[2], shape[3])
    scaled = query * shape[3] ** -0.5
    if segments is not None:
        segments = segments.unsqueeze(1).expand(-1, shape[1], -1).reshape(rows[:2])
    result = _BlockwiseAttention.apply(
        scaled.reshape(rows), key.reshape(rows), value.reshape(rows), segments, is_causal
    )
    return result.view(shape)


def allowed(segments: Int[Tensor, "N T"], rows: slice, end: int, *, is_causal: bool) -> Tensor:
    """Whether queries `rows` may see keys 0…end, (N, rows, end) bool."""
    same = segments[:, rows].unsqueeze(2) == segments[:, :end].unsqueeze(1)
    return same & _not_after(rows, end, segments) if is_causal else same


def _not_after(rows: slice, end: int, like: Tensor) -> Tensor:
    """Whether a key 0…end stands not after a query of `rows`, (rows, end) bool."""
    # As float32, exact up to 2²⁴: scores are masked by vectors of their own width.
    keys = torch.arange(end, dtype=torch.float32, device=like.device)
    places = torch.arange(rows.start, rows.stop, dtype=torch.float32, device=like.device)
    return keys <= places.unsqueeze(1)


def _scores(
    query: Float[Tensor, "N T S"],
    key: Float[Tensor, "N T S"],
    segments: Int[Tensor, "N T"] | None,
    span: tuple[int, int, int],
    is_causal: bool,
) -> Float[Tensor, "N block end"]:
    """Masked float32 scores (N, block, end) of the span's queries against its keys."""
    start, stop, end = span
    rows = slice(start, stop)
    scores = torch.bmm(query[:, rows], key[:, :end].transpose(1, 2)).float()
    if segments is not None:
        mask = allowed(segments, rows, end, is_causal=is_causal)
    elif is_causal:
        mask = _not_after(rows, end, query)
    else:
        return scores
    return torch.where(mask, scores, float("-inf"))


class _BlockwiseAttention(torch.autograd.Function):
    """Forward and backward by blocks of queries; tensors are (N = B·H, T, S)."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context type is not public
        query: Float[Tensor, "N T S"],
        key: Float[Tensor, "N T S"],
        value: Float[Tensor, "N T S"],
        segments: Int[Tensor, "N T"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "N T S"]:
        outputs: list[Tensor] = []
        normalizers: list[Tensor] = []
        for span in _spans(query.shape[1], is_causal):
            scores = _scores(query, key, segments, span, is_causal)
            normalizer = torch.logsumexp(scores, -1)
            weights = torch.exp(scores - normalizer.unsqueeze(-1)).to(query.dtype)
            outputs.append(torch.bmm(weights, value[:, : span[2]]))
            normalizers.append(normalizer)
        output = torch.cat(outputs, 1)
        ctx.save_for_backward(query, key, value, segments, output, *normalizers)
        ctx.is_causal = is_causal
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context type is not public
        gradient = grad_outputs[0]
        query, key, value, segments, output, *normalizers = ctx.saved_tensors
        correction = (gradient.float() * output.float()).sum(-1, keepdim=True)
        for_query: list[Tensor] = []
        for_key: list[Tensor] = []
        for_value: list[Tensor] = []
        spans = _spans(query.shape[1], ctx.is_causal)
        for span, normalizer in zip(spans, normalizers, strict=True):
            rows, end = slice(*span[:2]), span[2]
            scores = _scores(query, key, segments, span, ctx.is_causal)
            weights = torch.exp(scores - normalizer.unsqueeze(-1))
            upstream = torch.bmm(gradient[:, rows], value[:, :end].transpose(1, 2)).float()
            inner = (weights * (upstream - correction[:, rows])).to(query.dtype)
            for_query.append(torch.bmm(inner, key[:, :end]))
            for_key.append(torch.bmm(inner.transpose(1, 2), query[:, rows]))
            weights = weights.to(query.dtype).transpose(1, 2)
            for_value.append(torch.bmm(weights, gradient[:, rows]))
        return (
            torch.cat(for_query, 1),
            _sum_by_block(for_key, spans),
            _sum_by_block(for_value, spans),
            None,
            None,
        )


def _spans(length: int, is_causal: bool) -> list[tuple[int, int, int]]:
    """Blocks of queries that cover 0…length: first, end, and the end of the keys they may see."""
    ends = [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]
    return [(start, stop, stop if is_causal else length) for start, stop in ends]


def _sum_by_block(parts: list[Tensor], spans: list[tuple[int, int, int]]) -> Tensor:
    """Sum in float32 the parts (N, end, S), which share a prefix of positions, to (N, T, S)."""
    pieces: list[Tensor] = []
    for start, stop, _ in spans:
        shared = [part for part in parts if part.shape[1] >= stop]
        total = shared[0][:, start:stop].float()
        for part in shared[1:]:
            total = total + part[:, start:stop].float()
        pieces.append(total.to(parts[0].dtype))
    return torch.cat(pieces, 1)
