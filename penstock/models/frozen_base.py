"""The frozen matrices under low-rank adapters, held in 8 or 4 bits: memory for time.

`jobs.py` has a model's blocks hold their matrices so where the adapter says it, `runs.py` has them
whole again, `compiler/region_inputs.py` unpacks them for kernels. It must never change what is
trained.

Source: QLoRA, Dettmers et al., arXiv 2305.14314, §3: the weights are unpacked for each product (by
kernels: for each block), forward and backward, and the unpacked ones are never kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

from penstock.models.adapter import NF4_GROUP
from penstock.models.cut import Cut
from penstock.models.projection import Projection
from penstock.models.quantization import dequantize, quantize
from penstock.models.transformer import Transformer

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of 4-bit NormalFloat: quantiles of a normal distribution (arXiv 2305.14314,
appendix E)."""


def pack_nf4(weight: Float[Tensor, "N K"]) -> tuple[UInt8[Tensor, " B"], Float[Tensor, " G"]]:
    """Weights (N, K) to the nearest of 16 multiples of the largest of each 64 in a row of all:
    (N·K / 2,) uint8, two to a byte, the first in the high bits, and (N·K / 64,) float32.
    """
    flat = weight.float().flatten()
    groups = F.pad(flat, (0, -len(flat) % NF4_GROUP)).view(-1, NF4_GROUP)
    scale = groups.abs().amax(1)
    values = torch.tensor(_NF4, device=weight.device)
    middles = (values[1:] + values[:-1]) / 2
    divisor = torch.where(scale > 0, scale, 1.0)
    codes = torch.bucketize(groups / divisor[:, None], middles).to(torch.uint8).flatten()
    return codes[::2] << 4 | codes[1::2], scale


def unpack_nf4(
    packed: UInt8[Tensor, " B"], scale: Float[Tensor, " G"], rows: int, columns: int
) -> Float[Tensor, "N K"]:
    """The weights (N, K) float32 that `pack_nf4` stands for."""
    # A byte stands for a pair of values: one look-up of both takes a third of the time of two.
    values = torch.tensor(_NF4, device=packed.device)
    pairs = torch.cartesian_prod(values, values)  # (256, 2), by the high bits first
    found = pairs.index_select(0, packed.int()).view(-1, NF4_GROUP)
    return found.mul_(scale[:, None]).flatten()[: rows * columns].view(rows, columns)


class HeldLinear(nn.Linear):
    """A linear layer without gradients whose weight is held in few bits."""

    kind: str
    codes: Int8[Tensor, "N K"] | UInt8[Tensor, " B"]
    scales: Float[Tensor, "..."]

    is_elsewhere: bool = False
    """Whether another process holds it."""

    def fill(self, weight: Float[Tensor, "O I"]) -> None:
        """Hold this weight (outputs, inputs)."""
        pack = quantize if self.kind == "int8" else pack_nf4
        self.codes, self.scales = pack(weight)

    def whole(self) -> Float[Tensor, "O I"]:
        """The weight (outputs, inputs) float32."""
        if self.kind == "int8":
            return dequantize(self.codes, self.scales)
        return unpack_nf4(self.codes, self.scales, self.out_features, self.in_features)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:  # pyright: ignore[reportIncompatibleMethodOverride] - x is our word for it
        """X (..., inputs) → (..., outputs)."""
        return held_product(x, self, self.bias)

    def take_part(self, whole: "HeldLinear", cut: Cut, part: int, parts: int) -> None:
        """Hold one part's share of a weight, as the bits it has there: `cut` divides no group of
        weights that share a scale (`compiler/demands.py`).
        """
        shares: list[Tensor] = []
        for kept in (whole.codes, whole.scales):
            rows = kept.view(whole.out_features, -1)
            # Of several weights in a row there is one byte, or scale.
            sections = cut.sections
            if cut.dimension == 1:
                sections = tuple(size * rows.shape[1] // whole.in_features for size in sections)
            shares.append(Cut(cut.dimension, sections).own(rows, part, parts))
        self.codes, self.scales = (
            share if share.ndim == kept.ndim else share.flatten()
            for share, kept in zip(shares, (whole.codes, whole.scales), strict=True)
        )


class HeldProjection(Projection, HeldLinear):
    """A `Projection` whose own product is a `HeldLinear`'s: its `super().forward` is that."""


def held_product(
    x: Float[Tensor, "... I"], layer: HeldLinear, bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "... O"]:
    """X (..., inputs) by a layer's weight, plus a bias: (..., outputs)."""
    return _HeldProduct.apply(x, layer, bias)


class _HeldProduct(torch.autograd.Function):
    """X Wᵀ + b, the weight unpacked in either direction and kept in none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: HeldLinear, bias: Tensor | None) -> Tensor:  # noqa: ANN401 - torch's context type is not public
        ctx.layer = layer
        return F.linear(x, layer.whole().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride] - as above
        (grad,) = grad_outputs
        return grad @ ctx.layer.whole().to(grad.dtype), None, None


def become_held(
    module: Projection, kind: str, held: type[HeldLinear] = HeldProjection
) -> HeldLinear:
    """Have a projection hold its weight in few bits, empty until it is filled, as the class
    `held`.
    """
    is_elsewhere = module.weight.is_meta
    del module.weight
    plain: Any = module
    plain.__class__ = held
    made: HeldLinear = plain
    made.is_elsewhere = is_elsewhere
    made.kind = kind
    for buffer in ("codes", "scales"):
        made.register_buffer(buffer, None, persistent=False)
    return made


def make_held(model: Transformer, kind: str) -> dict[str, HeldLinear]:
    """Have every matrix of the blocks be held in few bits, empty until it is filled; by the names
    of their weights.
    """
    found: dict[str, HeldLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, Projection):
            found[f"{name}.weight"] = become_held(module, kind)
    return found


@torch.no_grad()
def hold(model: Transformer, kind: str) -> None:
    """Hold the matrices that a model has."""
    weights = dict(model.named_parameters())
    for name, module in make_held(model, kind).items():
        if not module.is_elsewhere:
            module.fill(weights[name])


@torch.no_grad()
def make_whole(model: Transformer, dtype: torch.dtype) -> None:
    """Give every held matrix the values it stands for, as an ordinary weight."""
    for module in model.modules():
        if isinstance(module, HeldProjection):
            weight = module.whole().to(dtype)
            del module.codes, module.scales
            plain: Any = module
            plain.__class__ = Projection
            module.weight = nn.Parameter(weight, requires_grad=False)
