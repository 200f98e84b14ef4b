"""Causal attention in blocks of queries, for processors without a fused kernel worth using.

`models/attention.py` calls this on CPU. Measured on a 2-core Zen 4 (GPT-2 124M block, 4 × 512
tokens, bf16): forward and backward of the whole block take 0.89 of the time they take with ATen's
flash attention for CPU, because the scores go through the vendor's batched matrix product and
Inductor fuses the softmax. It must never know about weights, norms or compilation.

Each block of queries attends only to keys up to its own end, so about (1 + 1/n)/2 of the full
square is computed for n blocks. Only the output and the log-sum-exp are kept for the backward
pass, which computes the scores again (FlashAttention, arXiv 2205.14135, algorithm 4).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

QUERY_BLOCK = 256
"""Queries per block; 128 and 512 were slower at T = 512 on the machine above."""


def causal_attention(
    query: Float[Tensor, "B H T S"], key: Float[Tensor, "B H T S"], value: Float[Tensor, "B H T S"]
) -> Float[Tensor, "B H T S"]:
    """Softmax attention over earlier positions; all tensors (B, H, T, S), one float dtype.

    Scores are scaled by 1/sqrt(S), the softmax is in float32 (Vaswani et al., arXiv 1706.03762,
    equation 1, with the causal mask).
    """
    shape = query.shape
    rows = (shape[0] * shape[1], shape[2], shape[3])
    scaled = query * shape[3] ** -0.5
    result = _BlockwiseAttention.apply(
        scaled.reshape(rows), key.reshape(rows), value.reshape(rows), QUERY_BLOCK
    )
    return result.view(shape)


def _scores(
    query: Float[Tensor, "N block S"], key: Float[Tensor, "N end S"], start: int
) -> Float[Tensor, "N block end"]:
    """Masked float32 scores (N, block, end) of queries start… against keys 0…end."""
    scores = torch.bmm(query, key.transpose(1, 2)).float()
    rows = torch.arange(start, start + query.shape[1], device=query.device).unsqueeze(1)
    columns = torch.arange(key.shape[1], device=query.device)
    return torch.where(columns <= rows, scores, float("-inf"))


class _BlockwiseAttention(torch.autograd.Function):
    """Forward and backward by blocks of queries; tensors are (N = B·H, T, S)."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context type is not public
        query: Float[Tensor, "N T S"],
        key: Float[Tensor, "N T S"],
        value: Float[Tensor, "N T S"],
        block: int,
    ) -> Float[Tensor, "N T S"]:
        outputs: list[Tensor] = []
        normalizers: list[Tensor] = []
        for start, end in _blocks(query.shape[1], block):
            scores = _scores(query[:, start:end], key[:, :end], start)
            normalizer = torch.logsumexp(scores, -1)
            weights = torch.exp(scores - normalizer.unsqueeze(-1)).to(query.dtype)
            outputs.append(torch.bmm(weights, value[:, :end]))
            normalizers.append(normalizer)
        output = torch.cat(outputs, 1)
        ctx.save_for_backward(query, key, value, output, *normalizers)
        ctx.block = block
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401 - torch's context type is not public
        gradient = grad_outputs[0]
        query, key, value, output, *normalizers = ctx.saved_tensors
        correction = (gradient.float() * output.float()).sum(-1, keepdim=True)
        for_query: list[Tensor] = []
        for_key: list[Tensor] = []
        for_value: list[Tensor] = []
        blocks = _blocks(query.shape[1], ctx.block)
        for (start, end), normalizer in zip(blocks, normalizers, strict=True):
            rows = slice(start, end)
            scores = _scores(query[:, rows], key[:, :end], start)
            weights = torch.exp(scores - normalizer.unsqueeze(-1))
            upstream = torch.bmm(gradient[:, rows], value[:, :end].transpose(1, 2)).float()
            inner = (weights * (upstream - correction[:, rows])).to(query.dtype)
            for_query.append(torch.bmm(inner, key[:, :end]))
            for_key.append(torch.bmm(inner.transpose(1, 2), query[:, rows]))
            weights = weights.to(query.dtype).transpose(1, 2)
            for_value.append(torch.bmm(weights, gradient[:, rows]))
        return (
            torch.cat(for_query, 1),
            _sum_by_block(for_key, blocks),
            _sum_by_block(for_value, blocks),
            None,
        )


def _blocks(length: int, block: int) -> list[tuple[int, int]]:
    """Half-open ranges of at most `block` positions covering 0…length."""
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _sum_by_block(parts: list[Tensor], blocks: list[tuple[int, int]]) -> Tensor:
    """Sum in float32 the parts (N, end, S) that share a prefix of positions, to (N, T, S)."""
    pieces: list[Tensor] = []
    for first, (start, end) in enumerate(blocks):
        total = parts[first][:, start:end].float()
        for part in parts[first + 1 :]:
            total = total + part[:, start:end].float()
        pieces.append(total.to(parts[0].dtype))
    return torch.cat(pieces, 1)
