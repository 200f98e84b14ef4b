"""The MLP of a block.

`models/transformer.py` builds it into blocks. It must never know about residuals or norms.
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from penstock.models.architecture import Architecture
from penstock.models.layers import activate
from penstock.models.projection import Projection


class Mlp(nn.Module):
    """Two linear layers around an activation, which a third may gate (Shazeer, arXiv 2002.05202,
    equation 6).
    """

    def __init__(self, architecture: Architecture) -> None:
        """Parameters: up (F, D), gate (F, D) where there is one, down (D, F); biases if any."""
        super().__init__()
        width, inner, bias = architecture.hidden_size, architecture.mlp_size, architecture.mlp_bias
        self.activation = architecture.activation
        self.up = Projection(architecture, "mlp.up", width, inner, bias=bias)
        self.down = Projection(architecture, "mlp.down", inner, width, bias=bias)
        self.gate = None
        if architecture.gated_mlp:
            self.gate = Projection(architecture, "mlp.gate", width, inner, bias=bias)

    def forward(
        self, x: Float[Tensor, "... D"], keys: Int[Tensor, "B sites"] | None = None
    ) -> Float[Tensor, "... D"]:
        """X (..., D) → (..., D); keys (B, sites) int64: the block's dropout keys."""
        if self.gate is None:
            return self.down(activate(self.up(x, keys), self.activation), keys)
        gated = activate(self.gate(x, keys), self.activation) * self.up(x, keys)
        return self.down(gated, keys)
