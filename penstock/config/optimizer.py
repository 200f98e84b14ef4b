"""The keys of the `optimizer` section.

`config/schema.py` gathers it, `training/optimizers.py` reads it. It must never import torch.
"""

from typing import Literal

from pydantic import Field

from penstock.config.section import Probability, Section

WHOLE_MATRICES = ("adamw_8bit", "adafactor")
"""Optimizers that change a weight by its neighbours' gradients too: those of the 256 whose moments
share a scale, those of its row and column. Muon comes by whole matrices itself."""


class OptimizerSection(Section):
    """The optimizer."""

    name: Literal[
        "adamw", "adamw_8bit", "muon", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "nadam",
        "radam", "adafactor",
    ] = "adamw"  # fmt: skip
    """adamw: Adam with decoupled weight decay (arXiv 1711.05101); adamw_8bit: the same with moments
    of 8 bits (arXiv 2110.02861; needs bitsandbytes); muon: orthogonalized momentum for the blocks'
    matrices (arXiv 2502.16982), AdamW for the rest; the others: torch.optim's, with decoupled
    weight decay too, but slower."""
    lr: float = Field(default=6e-4, ge=0, allow_inf_nan=False)
    """Peak learning rate, per optimizer step."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay per step, times the learning rate."""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum, and SGD's."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer is trained at this times the learning rate of the next, the embedding at this
    times the first layer's (ELECTRA, arXiv 2003.10555)."""
    eps: float = Field(default=1e-8, gt=0)
    """Constant added to the root of the second moment."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; null: no clipping."""
    decay_all: bool = False
    """Decay norms, biases and embeddings too, not only matrices."""
