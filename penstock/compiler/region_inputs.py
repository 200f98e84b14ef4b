"""A module's parameters as its kernels take them; those held in few bits are unpacked for a call.

`compiler/runtime.py` and `inference/decoding.py` read parameters through it. It must never know
what a kernel computes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from penstock.compiler.kernels import RegionContract
from penstock.models.frozen_base import HeldLinear

_WEIGHT = ".weight"


def parameters_of(module: nn.Module, contract: RegionContract) -> list[Tensor]:
    """A module's parameters in the order its kernels take them."""
    return [module.get_parameter(name) for name in contract.parameters]


class Held(NamedTuple):
    """Which of a region's inputs are only the codes of a matrix held in few bits: what may be kept
    for the backward pass, as the model has them anyway.
    """

    layers: dict[int, HeldLinear]
    """By place among the inputs."""
    dtype: torch.dtype
    """Format the kernels take weights in."""

    def unpacked(self, tensors: Sequence[Tensor], places: Sequence[int]) -> Sequence[Tensor]:
        """Tensors, of which the first are the inputs at these places, as kernels take them."""
        if not self.layers:
            return tensors
        layers = [self.layers.get(place) for place in places]
        layers += [None] * (len(tensors) - len(places))
        return [
            tensor if layer is None else layer.whole().to(self.dtype)
            for tensor, layer in zip(tensors, layers, strict=True)
        ]


def region_inputs(
    module: nn.Module, contract: RegionContract, x: Tensor, others: Sequence[Tensor]
) -> tuple[list[Tensor], Held]:
    """A module's parameters, x and what its region is given besides; and which of them are held."""
    held: dict[int, HeldLinear] = {}
    tensors: list[Tensor] = []
    for place, name in enumerate(contract.parameters):
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, HeldLinear) and name.endswith(_WEIGHT):
            held[place] = owner
            tensors.append(owner.codes)
        else:
            tensors.append(module.get_parameter(name))
    return [*tensors, x, *others], Held(held, x.dtype)
