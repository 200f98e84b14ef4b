"""The keys of the `lora` section: low-rank adapters instead of all weights.

`config/schema.py` gathers it, `models/lora.py` reads it. It must never import torch.
"""

from typing import Literal

from pydantic import Field

from penstock.config.section import Probability, Section


class LoraSection(Section):
    """Train low-rank adapters beside the blocks' linear layers, and nothing else."""

    rank: int | None = Field(default=None, ge=1)
    """Rank of the adapters (LoRA, arXiv 2106.09685); null: none, all weights are trained."""
    alpha: float | None = Field(default=None, gt=0)
    """What an adapter computes is multiplied by alpha / rank; 16 when not given."""
    dropout: Probability = 0.0
    """Probability of dropping an element of what an adapter is given, in training."""
    targets: list[str] = Field(default=[])
    """Layers with adapters, by the names `transformers` gives them or ours, such as [q_proj,
    v_proj], [c_attn] or [mlp.up]; all-linear: every one; none: attention's queries and values."""
    base: Literal["int8", "nf4"] | None = None
    """Hold the blocks' frozen matrices in 8 bits, or in 4 (NormalFloat, QLoRA, arXiv 2305.14314),
    while adapters are trained beside them. Null: in the compute format."""
    from_: str | None = Field(default=None, alias="from")
    """Folder of an adapter in PEFT's format to start from, or to evaluate and generate with; rank,
    alpha and targets are its own."""
