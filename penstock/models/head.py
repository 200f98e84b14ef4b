"""The last region: the projection to the vocabulary with what precedes it, and the loss.

`models/transformer.py` builds it. It must never know about batches or steps.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from penstock.models.architecture import Architecture
from penstock.models.loss import (
    HeadOptions,
    HeadWeights,
    before_projection,
    loss_and_gradients,
    token_losses,
)
from penstock.models.norm import Norm

_CHUNK_LOGITS = 1 << 24
"""Logits of one piece of the eager loss: 64 MiB in float32."""

WEIGHT_NAMES = {
    "projection": "projection.weight",
    "bias": "projection.bias",
    "norm_weight": "norm.weight",
    "norm_bias": "norm.bias",
    "transform_weight": "transform.weight",
    "transform_bias": "transform.bias",
}
"""Field of `HeadWeights` → name of the head's parameter."""


class Head(nn.Module):
    """A dense layer with an activation and a norm, where there are any, projection to the
    vocabulary, and the loss, in chunks of tokens.
    """

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: transform (E, D) with its bias, norm (E,), projection (Vpadded, E), with a
        bias (Vpadded,) if it has one.
        """
        super().__init__()
        a, width = architecture, architecture.embedding_width
        self.options = HeadOptions(a.norm_epsilon, a.activation, a.vocab_size, 1)
        self.transform = nn.Linear(a.hidden_size, width) if a.head_transform else None
        self.norm = Norm(a, width) if a.has_head_norm else None
        self.projection = nn.Linear(width, a.padded_vocab_size, bias=a.head_bias)

    def logits(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """X (..., D) → logits (..., V) in x's dtype, the padding cut off."""
        prepared = before_projection(self._weights(), x, self.options)
        return self.projection(prepared)[..., : self.options.vocab_size]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        targets: Int[Tensor, "B T"],
        loss_weights: Float[Tensor, "B T"],
        z_loss: Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        """Sum of loss_weights × cross entropy, () float32, in nats.

        x (B, T, D); targets (B, T) int64; loss_weights (B, T) float32; z_loss () float32 is the
        factor of the squared log-partition (PaLM, arXiv 2204.02311, §5).
        """
        z_loss = x.new_zeros((), dtype=torch.float32) if z_loss is None else z_loss
        return _ChunkedLoss.apply(
            *self._weights(), x, targets, loss_weights, z_loss, self._options(x)
        )

    def token_losses(
        self, x: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """Negative log-likelihood of each target in nats, (B, T) float32, without gradients."""
        return token_losses(self._weights(), x, targets, self._options(x))

    def _weights(self) -> HeadWeights:
        """Its parameters; None for those there are not."""
        return head_weights(dict(self.named_parameters()))

    def _options(self, x: Tensor) -> HeadOptions:
        """In pieces so that one piece's logits stay small."""
        rows = x.shape[:-1].numel()
        chunks = -(-rows * self.projection.out_features // _CHUNK_LOGITS)
        trained = self.projection.weight.requires_grad
        return self.options._replace(chunks=min(rows, chunks), trains_projection=trained)


def head_weights(named: dict[str, Tensor]) -> HeadWeights:
    """The head's parameters from their names in the module."""
    return HeadWeights(**{field: named.get(name) for field, name in WEIGHT_NAMES.items()})  # pyright: ignore[reportArgumentType] - every head has a projection


class _ChunkedLoss(torch.autograd.Function):
    """`models/loss.py` as a differentiable function: gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # noqa: ANN401 - torch's context type, mixed inputs
        """See `Head.forward`."""
        weights, rest = HeadWeights(*inputs[: len(WEIGHT_NAMES)]), inputs[len(WEIGHT_NAMES) :]
        result = loss_and_gradients(weights, *rest)
        ctx.save_for_backward(*result.weights, result.x)
        return result.loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as above
        """Scale the gradients by the one of the loss."""
        scaled = tuple(
            None if g is None else g * grad_outputs[0].to(g.dtype) for g in ctx.saved_tensors
        )
        return (*scaled, *(None,) * 4)
