"""The norm as a module: its weights, and which of the two kinds it is.

Embed, Block and Head build theirs with it. It must never know where in a model it stands.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from penstock.models.architecture import Architecture
from penstock.models.layers import normalize


class Norm(nn.Module):
    """Layer norm with weight and bias (D,), or root-mean-square norm with a weight (D,)."""

    def __init__(self, architecture: Architecture, width: int | None = None) -> None:
        """Kind and epsilon from the architecture; width: the hidden size when not given."""
        super().__init__()
        width = width or architecture.hidden_size
        self.epsilon = architecture.norm_epsilon
        self.weight = nn.Parameter(torch.ones(width))
        has_bias = architecture.norm == "layer"
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Normalize x (..., D)."""
        return normalize(x, self.weight, self.bias, self.epsilon)
