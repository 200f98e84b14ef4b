"""Projection and cross entropy of the head in pieces, so that the logits never exist whole.

The compiler traces these functions as the head's kernels, and eager training calls them as they
are. The forward pass computes the gradients too, since each piece's logits are at hand only then
(Liger-Kernel's and Apple's fused losses do the same). It must never know about batches or steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from penstock.models.layers import activate, normalize


class HeadWeights(NamedTuple):
    """The head's parameters, or their gradients; None for those it does not have."""

    projection: Tensor
    """(Vpadded, E)"""
    bias: Tensor | None = None
    """(Vpadded,), added to the logits."""
    norm_weight: Tensor | None = None
    """(E,)"""
    norm_bias: Tensor | None = None
    """(E,)"""
    transform_weight: Tensor | None = None
    """(E, D), of the dense layer before the norm."""
    transform_bias: Tensor | None = None
    """(E,)"""


class HeadOptions(NamedTuple):
    """What the head computes besides its weights."""

    epsilon: float
    """Of its norm."""
    activation: str
    """Of its dense layer; see `architecture.CHOICES`."""
    vocab_size: int
    chunks: int
    """Pieces of tokens that are projected one after the other."""
    trains_projection: bool = True
    """Whether its gradient is wanted."""


def before_projection(
    weights: HeadWeights, x: Float[Tensor, "... D"], options: HeadOptions
) -> Float[Tensor, "... E"]:
    """What the head projects: x (..., D) behind its dense layer and its norm, where it has them.

    Source: BERT's masked language model head (Devlin et al., arXiv 1810.04805, and its code).
    """
    if weights.transform_weight is not None:
        x = F.linear(x, weights.transform_weight, weights.transform_bias)
        x = activate(x, options.activation)
    if weights.norm_weight is not None:
        x = normalize(x, weights.norm_weight, weights.norm_bias, options.epsilon)
    return x


class HeadGradients(NamedTuple):
    """Result of `loss_and_gradients`; the gradients are of `loss`."""

    loss: Tensor
    """() float32: sum of loss_weights × (cross entropy + z_loss × log-partition²)."""
    cross_entropy: Tensor
    """() float32: sum of loss_weights × cross entropy."""
    x: Tensor
    """(B, T, D), the input's dtype."""
    weights: HeadWeights
    """Of the projection and its bias, summed over the pieces in float32; the projection's is () 0
    where it is not wanted."""


def loss_and_gradients(
    weights: HeadWeights,
    x: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    loss_weights: Float[Tensor, "B T"],
    z_loss: Float[Tensor, ""],
    options: HeadOptions,
) -> HeadGradients:
    """What precedes the projection, projection, weighted cross entropy, and all gradients.

    x (B, T, D); targets (B, T) int64; loss_weights (B, T) float32; z_loss () float32, the factor
    of the squared log-partition (PaLM, arXiv 2204.02311, §5).
    """
    projection, bias = weights.projection, weights.bias
    with torch.enable_grad():
        first = x.detach().requires_grad_()
        before = {
            name: value.detach().requires_grad_()
            for name, value in weights._asdict().items()
            if value is not None and name not in ("projection", "bias")
        }
        prepared = before_projection(HeadWeights(projection, **before), first, options)
    rows = prepared.detach().flatten(0, 1)  # (N, E)
    size = -(-rows.shape[0] // options.chunks)
    loss, nats = (torch.zeros((), device=x.device) for _ in range(2))
    row_gradients: list[Tensor] = []
    for_projection, for_bias = (torch.zeros((), device=x.device) for _ in range(2))
    for piece, target, weight in zip(
        rows.split(size),
        targets.flatten().split(size),
        loss_weights.flatten().split(size),
        strict=True,
    ):
        nll, normalizer, gradient = cross_entropy(
            piece @ projection.t(), bias, target, weight, z_loss, options.vocab_size
        )
        nats = nats + (weight * nll).sum()
        loss = loss + (weight * (nll + z_loss * normalizer.square())).sum()
        row_gradients.append(gradient @ projection)
        if options.trains_projection:
            part = gradient.t() @ piece
            # Summed in float32: bf16 sums would lose the small ones.
            for_projection = part if options.chunks == 1 else for_projection + part.float()
        if bias is not None:
            for_bias = for_bias + gradient.float().sum(0)
    for_prepared = torch.cat(row_gradients).view_as(prepared)
    for_x, for_before = for_prepared, dict[str, Tensor]()
    if before:
        for_x, *found = torch.autograd.grad(prepared, [first, *before.values()], for_prepared)
        for_before = dict(zip(before, found, strict=True))
    gradients = HeadWeights(
        for_projection.to(projection.dtype),
        None if bias is None else for_bias.to(bias.dtype),
        **for_before,
    )
    return HeadGradients(loss, nats, for_x, gradients)


def cross_entropy(
    products: Float[Tensor, "n V"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    z_loss: Float[Tensor, ""],
    vocab: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """Negative log-likelihood (n,), log-partition (n,), and the gradient of the logits (n, Vpadded)
    in the dtype of the projection's products (n, Vpadded); bias (Vpadded,) is added to these.
    """
    logits = _logits(products, bias, vocab)
    normalizer = torch.logsumexp(logits, -1)
    nll = normalizer - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    probabilities = torch.exp(logits - normalizer.unsqueeze(1))
    hit = _columns(products) == targets.to(torch.float32).unsqueeze(1)
    scale = 1 + 2 * z_loss * normalizer.unsqueeze(1)
    gradient = (probabilities * scale - hit.float()) * weights.unsqueeze(1)
    return nll, normalizer, gradient.to(products.dtype)


def _logits(
    products: Float[Tensor, "n V"], bias: Float[Tensor, " V"] | None, vocab: int
) -> Float[Tensor, "n V"]:
    """Float32 logits (n, Vpadded), minus infinity beyond the vocabulary."""
    logits = products.float() if bias is None else products.float() + bias.float()
    return torch.where(_columns(products) < vocab, logits, float("-inf"))


def _columns(products: Float[Tensor, "n V"]) -> Float[Tensor, " V"]:
    """Numbers of the tokens, as float32, exact up to 2²⁴: logits are masked by vectors of their own
    width, integers have 64 bits.
    """
    return torch.arange(products.shape[1], dtype=torch.float32, device=products.device)


def token_losses(
    weights: HeadWeights,
    x: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    options: HeadOptions,
) -> Float[Tensor, "B T"]:
    """Negative log-likelihood in nats of each target (B, T) float32, without gradients."""
    rows = before_projection(weights, x, options).flatten(0, 1)
    size = -(-rows.shape[0] // options.chunks)
    pieces: list[Tensor] = []
    for piece, target in zip(rows.split(size), targets.flatten().split(size), strict=True):
        logits = _logits(piece @ weights.projection.t(), weights.bias, options.vocab_size)
        chosen = logits.gather(1, target.unsqueeze(1)).squeeze(1)
        pieces.append(torch.logsumexp(logits, -1) - chosen)
    return torch.cat(pieces).view(targets.shape)
