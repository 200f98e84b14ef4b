"""What one call of an update takes: groups of pieces for torch's fused kernel, settings for ours.

`training/optimizer.py` makes and uses them. It must never know what a parameter is for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.config.schema import OptimizerSection
from penstock.training.masters import split


@dataclass(frozen=True, slots=True)
class Group:
    """Flat pieces of parameters that one fused call updates; all lists run in parallel."""

    weight_decay: float
    """Decoupled decay of every piece."""
    share: float
    """Of the learning rate, of every piece."""
    places: list[tuple[int, int, int]]
    """Of each piece: index of its parameter, first element, element past its last."""
    weights: list[Tensor]
    """(n,) views of the model's parameters in the compute format; empty when those are fp32."""
    masters: list[Tensor]
    """(n,) float32 views of the masters, of the parameters themselves when those are fp32, or of
    space shared by all groups where masters are split."""
    rests: list[Tensor]
    """(n,) int16 views of what the weights lack of their masters; empty where those are whole."""
    exp_avgs: list[Tensor]
    """(n,) float32 views of the first moments."""
    exp_avg_sqs: list[Tensor]
    """(n,) float32 views of the second moments."""
    scratch: list[Tensor]
    """(n,) float32 views of the space shared by all groups for fp32 copies of gradients."""


class UpdateSettings:
    """What the kernel adamw is told in one step (`compiler/update.py`)."""

    def __init__(
        self, section: OptimizerSection, steps: int, lr: float, scale: Tensor | None
    ) -> None:
        """The step is number `steps`, from 1; gradients are divided by `scale` () float32."""
        self._section, self._steps, self._lr = section, steps, lr
        self._factor = 1.0 if scale is None else 1.0 / scale.item()
        self._made: dict[tuple[float, float], Tensor] = {}

    def tensor(self, share: float, weight_decay: float) -> Tensor:
        """(SETTINGS,) float32 of parameters with this share of the rate, and this decay."""
        kind = share, weight_decay
        if kind not in self._made:
            self._made[kind] = torch.tensor(self._values(share * self._lr, weight_decay))
        return self._made[kind]

    def _values(self, lr: float, weight_decay: float) -> list[float]:
        section, (first, second) = self._section, self._section.betas
        corrections = 1 - first**self._steps, 1 - second**self._steps
        return [
            1 - lr * weight_decay, lr / corrections[0], 1 - first, second, 1 - second,
            corrections[1] ** -0.5, section.eps, self._factor,
        ]  # fmt: skip


def cut(space: Tensor, sizes: list[int]) -> list[Tensor]:
    """The beginning of `space` in pieces."""
    return list(space[: sum(sizes)].split(sizes))


def round_masters(group: Group) -> None:
    """Set a group's parameters from its masters."""
    if group.rests:
        split(group.masters, group.weights, group.rests)
    elif group.weights:
        torch._foreach_copy_(group.weights, group.masters)
