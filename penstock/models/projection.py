"""A block's linear layers, with low-rank adapters beside them where the architecture has some.

`models/transformer.py` and `models/attention.py` build them into blocks, the compiler traces them.
It must never know where adapters come from or how they are stored.
"""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from penstock.models.adapter import Adapter, Site
from penstock.models.architecture import Architecture
from penstock.models.dropout_rates import BLOCK_DROPOUT_SITES
from penstock.models.layers import dropout


class LowRank(nn.Module):
    """B A x: `down` (A) is (R, columns), `up` (B) is (rows, R)."""

    def __init__(self, adapter: Adapter, site: Site) -> None:
        """Random `down`, `up` of zeros: see `models/initialization.py`."""
        super().__init__()
        self.down = nn.Parameter(torch.empty(adapter.rank, site.columns).uniform_(-1, 1))
        self.up = nn.Parameter(torch.zeros(site.rows, adapter.rank))


class Projection(nn.Linear):
    """A linear layer and what its adapters add.

    Source: Hu et al., arXiv 2106.09685, equation 3; dropout before A as its authors' code has it.
    """

    def __init__(
        self, architecture: Architecture, name: str, inputs: int, outputs: int, *, bias: bool
    ) -> None:
        """Parameters: weight (outputs, inputs), bias (outputs,), and those of the adapters."""
        super().__init__(inputs, outputs, bias=bias)
        adapter = architecture.adapter
        sites = () if adapter is None else adapter.sites
        self.whole_inputs = inputs
        """Of the layer that this is, or is a part of."""
        self._placed = [(p, site) for p, site in enumerate(sites) if site.linear == name]
        self.adapters = nn.ModuleDict()
        if adapter is not None:
            self.adapters.update({site.key: LowRank(adapter, site) for _, site in self._placed})
            self.scale, self.rate = adapter.scale, adapter.dropout

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - x is our word for it
        self, x: Float[Tensor, "... I"], keys: Int[Tensor, "B sites"] | None = None
    ) -> Float[Tensor, "... O"]:
        """X (..., inputs) → (..., outputs); keys (B, sites) int64: a block's dropout keys."""
        y = self.own_product(x)
        if not self._placed:
            return y
        low = self._low(x, keys).flatten(0, -2)
        # One product that adds: of Wx and BAx only the sum is kept for the backward pass.
        return torch.addmm(y.flatten(0, -2), low, self._up().t(), alpha=self.scale).view_as(y)

    def own_product(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """The layer's own, without adapters: (..., outputs)."""
        return super().forward(x)

    def _low(
        self, x: Float[Tensor, "... I"], keys: Int[Tensor, "B sites"] | None
    ) -> Float[Tensor, "... N"]:
        """A x of all adapters, side by side: (..., sites × R)."""
        downs: list[Tensor] = [low.down for low in self._adapters()]
        if keys is None or self.rate == 0:
            return F.linear(x, torch.cat(downs))
        given = [
            dropout(x, keys[:, BLOCK_DROPOUT_SITES + place], self.rate, self.whole_inputs)
            for place, _ in self._placed
        ]
        parts = [F.linear(one, down) for one, down in zip(given, downs, strict=True)]
        return torch.cat(parts, -1)

    def _up(self) -> Float[Tensor, "O N"]:
        """B of all adapters, side by side, each in its rows: (outputs, sites × R)."""
        ups = [
            F.pad(low.up, (0, 0, site.start, self.out_features - site.start - site.rows))
            for (_, site), low in zip(self._placed, self._adapters(), strict=True)
        ]
        return torch.cat(ups, 1)

    def _adapters(self) -> list[LowRank]:
        return [cast(LowRank, self.adapters[site.key]) for _, site in self._placed]

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapters to the weight, in its format, and drop them."""
        for (_, site), low in zip(self._placed, self._adapters(), strict=True):
            rows = self.weight[site.start : site.start + site.rows]
            rows += (low.up.float() @ low.down.float() * self.scale).to(rows.dtype)
        self._placed = []
        self.adapters = nn.ModuleDict()


def is_trained(architecture: Architecture, name: str) -> bool:
    """Whether a parameter is one that training changes: where there are adapters, they alone."""
    return architecture.adapter is None or ".adapters." in name


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter of a model to its weight; see `Projection.merge`."""
    for module in model.modules():
        if isinstance(module, Projection):
            module.merge()
