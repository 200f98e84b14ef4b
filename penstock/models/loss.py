"""Projection and cross entropy of the head in pieces, so that the logits never exist whole.

The compiler traces these functions as the head's kernels, and eager training calls them as they
are. The forward pass computes the gradients too, since each piece's logits are at hand only then
(Liger-Kernel's and Apple's fused losses do the same). It must never know about batches or steps.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from penstock.models.layers import normalize


class HeadGradients(NamedTuple):
    """Result of `loss_and_gradients`; the gradients are of `loss`."""

    loss: Tensor
    """() float32: sum of loss_weights × (cross entropy + z_loss × log-partition²)."""
    cross_entropy: Tensor
    """() float32: sum of loss_weights × cross entropy."""
    x: Tensor
    """(B, T, D), the input's dtype."""
    norm_weight: Tensor
    """(D,)"""
    norm_bias: Tensor | None
    """(D,), where the norm has one."""
    projection: Tensor | None
    """(Vpadded, D), summed over the pieces in float32; None where it is not trained."""
    bias: Tensor | None = None
    """(Vpadded,), where the projection has one, summed likewise."""


def loss_and_gradients(
    norm_weight: Float[Tensor, " D"],
    norm_bias: Float[Tensor, " D"] | None,
    projection: Float[Tensor, "V D"],
    x: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    loss_weights: Float[Tensor, "B T"],
    z_loss: Float[Tensor, ""],
    *,
    epsilon: float,
    vocab_size: int,
    chunks: int,
    bias: Float[Tensor, " V"] | None = None,
    trains_projection: bool = True,
) -> HeadGradients:
    """Final norm, projection, weighted cross entropy, and the gradients of all of it.

    x (B, T, D); targets (B, T) int64; loss_weights (B, T) float32; z_loss () float32, the factor
    of the squared log-partition (PaLM, arXiv 2204.02311, §5). `chunks` pieces of tokens are
    projected one after the other, bias (Vpadded,) added. A projection not trained has no gradient.
    """
    with torch.enable_grad():
        given = (x, norm_weight, norm_bias)
        leaves = [t.detach().requires_grad_() for t in given if t is not None]
        normalized = normalize(leaves[0], leaves[1], (*leaves, None)[2], epsilon)
    rows = normalized.detach().flatten(0, 1)  # (N, D)
    size = -(-rows.shape[0] // chunks)
    loss, cross_entropy = (torch.zeros((), device=x.device) for _ in range(2))
    row_gradients: list[Tensor] = []
    for_projection, for_bias = (torch.zeros((), device=x.device) for _ in range(2))
    for piece, target, weight in zip(
        rows.split(size),
        targets.flatten().split(size),
        loss_weights.flatten().split(size),
        strict=True,
    ):
        nll, normalizer, gradient = _piece(
            piece, projection, bias, target, weight, z_loss, vocab_size
        )
        cross_entropy = cross_entropy + (weight * nll).sum()
        loss = loss + (weight * (nll + z_loss * normalizer.square())).sum()
        row_gradients.append(gradient @ projection)
        if trains_projection:
            part = gradient.t() @ piece
            # Summed in float32: bf16 sums would lose the small ones.
            for_projection = part if chunks == 1 else for_projection + part.float()
        if bias is not None:
            for_bias = for_bias + gradient.float().sum(0)
    for_x, *for_norm = torch.autograd.grad(
        normalized, leaves, torch.cat(row_gradients).view_as(normalized)
    )
    return HeadGradients(
        loss,
        cross_entropy,
        for_x,
        for_norm[0],
        (*for_norm, None)[1],
        for_projection.to(projection.dtype) if trains_projection else None,
        None if bias is None else for_bias.to(bias.dtype),
    )


def _piece(
    rows: Float[Tensor, "n D"],
    projection: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    z_loss: Float[Tensor, ""],
    vocab: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """Negative log-likelihood (n,), log-partition (n,), gradient of the logits (n, Vpadded)."""
    logits = _logits(rows, projection, bias, vocab)
    normalizer = torch.logsumexp(logits, -1)
    nll = normalizer - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    probabilities = torch.exp(logits - normalizer.unsqueeze(1))
    columns = torch.arange(projection.shape[0], device=rows.device)
    hit = columns == targets.unsqueeze(1)
    scale = 1 + 2 * z_loss * normalizer.unsqueeze(1)
    gradient = (probabilities * scale - hit.float()) * weights.unsqueeze(1)
    return nll, normalizer, gradient.to(rows.dtype)


def _logits(
    rows: Float[Tensor, "n D"],
    projection: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    vocab: int,
) -> Float[Tensor, "n V"]:
    """Float32 logits (n, Vpadded), minus infinity beyond the vocabulary."""
    logits = (rows @ projection.t()).float()
    logits = logits if bias is None else logits + bias.float()
    columns = torch.arange(projection.shape[0], device=rows.device)
    return torch.where(columns < vocab, logits, float("-inf"))


def token_losses(
    norm_weight: Float[Tensor, " D"],
    norm_bias: Float[Tensor, " D"] | None,
    projection: Float[Tensor, "V D"],
    x: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    *,
    epsilon: float,
    vocab_size: int,
    chunks: int,
    bias: Float[Tensor, " V"] | None = None,
) -> Float[Tensor, "B T"]:
    """Negative log-likelihood in nats of each target (B, T) float32, without gradients."""
    rows = normalize(x, norm_weight, norm_bias, epsilon).flatten(0, 1)
    size = -(-rows.shape[0] // chunks)
    pieces: list[Tensor] = []
    for piece, target in zip(rows.split(size), targets.flatten().split(size), strict=True):
        logits = _logits(piece, projection, bias, vocab_size)
        chosen = logits.gather(1, target.unsqueeze(1)).squeeze(1)
        pieces.append(torch.logsumexp(logits, -1) - chosen)
    return torch.cat(pieces).view(targets.shape)
