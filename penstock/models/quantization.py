"""Weights of matrices in 8 bits: symmetric, with a scale for every output and group of inputs.

Kernels for generation take them as they are; everything else computes with the rounded values.
Nothing is calibrated: weights of any checkpoint are rounded when it is loaded.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from penstock.models.architecture import WEIGHT_GROUP
from penstock.models.transformer import Transformer


def quantize(weight: Float[Tensor, "N K"]) -> tuple[Int8[Tensor, "N K"], Float[Tensor, "N G"]]:
    """Weights (N, K) to the nearest of 255 multiples of their group's scale: (N, K) int8 and
    (N, G) float32.

    Absmax scaling: Dettmers et al., arXiv 2208.07339, §2.1; a group of zeros has scale 0.
    """
    outputs, inputs = weight.shape
    groups = -(-inputs // WEIGHT_GROUP)
    padded = weight.new_zeros(outputs, groups * WEIGHT_GROUP, dtype=torch.float32)
    padded[:, :inputs] = weight
    grouped = padded.view(outputs, groups, WEIGHT_GROUP)
    scale = grouped.abs().amax(-1) / 127  # (N, G)
    divisor = torch.where(scale > 0, scale, 1.0)
    whole = (grouped / divisor.unsqueeze(-1)).round().to(torch.int8)
    return whole.flatten(1)[:, :inputs], scale


def dequantize(whole: Int8[Tensor, "N K"], scale: Float[Tensor, "N G"]) -> Float[Tensor, "N K"]:
    """The weights (N, K) float32 that `quantize` stands for."""
    return whole * scale.repeat_interleave(WEIGHT_GROUP, 1)[:, : whole.shape[1]]


@torch.no_grad()
def round_weights(model: Transformer) -> None:
    """Give every matrix of the blocks and the head the values it has in 8 bits.

    Embeddings and norms stay; a head tied to the embedding gets a matrix of its own.
    """
    projection = model.head.projection
    if projection.weight is model.embed.tokens.weight:
        copy = projection.weight.detach().clone()
        projection.weight = nn.Parameter(copy, requires_grad=projection.weight.requires_grad)
    inside = (module for block in model.blocks for module in block.modules())
    for module in (*inside, projection):
        if isinstance(module, nn.Linear):
            module.weight.copy_(dequantize(*quantize(module.weight)))
