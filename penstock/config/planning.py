"""The keys of the `plan` section: how one step maps to a machine.

`config/schema.py` gathers it with the others, the planner receives it. It must never import torch.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from penstock.config.recompute import check_policy
from penstock.config.section import Section


class PlanSection(Section):
    """How one step maps to the machine."""

    target: str = "detect"
    """Machine to plan for: detect or cpu (this one), a name of hardware/targets, or a YAML file."""
    recompute: Annotated[str, AfterValidator(check_policy)] | None = None
    """What the backward pass computes again instead of keeping: none; selective: what lies between
    the matrix products; blocks: whole blocks from their inputs; every-N, such as every-2: each N-th
    block so, the others selectively. If not given: selective with compiled kernels, else none."""
    loss_chunks: int | None = Field(default=None, ge=1)
    """Pieces in which projection and loss are computed; chosen from the sizes when not given."""
    stages: int | None = Field(default=None, ge=1)
    """Pipeline stages, a device each; which blocks each holds is found by balancing time and
    memory. One when neither this nor layers_per_stage is given."""
    layers_per_stage: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    """Blocks of each stage, as [4, 4, 4, 0]; the first stage also holds the embedding, the last one
    the head, with a copy of the embedding where it has its weights."""
    micro_batches: int | None = Field(default=None, ge=1)
    """Micro-batches that go through a pipeline one behind another, on each replica; batch.size is
    chosen to fit when it is not given."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero-bubble"] = "1f1b"
    """Order of a pipeline's micro-batches: backward as soon as possible; all forward, then all
    backward; two pieces of the depth per stage, each with backward as soon as possible; or
    gradients of weights apart, where there would be waiting (ZB-H1, arXiv 2401.10241)."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model, each with its share of batch.size."""
    shard: Literal["none", "optimizer", "gradients", "weights"] = "none"
    """What replicas divide among themselves instead of each holding all of it: nothing, the
    optimizer's state, also gradients, or also weights (ZeRO 1, 2 and 3, arXiv 1910.02054)."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """What sums gradients, divides what `shard` says, and updates: torch, or DeepSpeed's engine by
    its ZeRO stages 0 to 3 (needs the extra `deepspeed`)."""
    tensor: int = Field(default=1, ge=1)
    """Devices that compute each block together: heads and the MLP's inner width are divided among
    them (Megatron-LM, arXiv 1909.08053); embedding and head are whole on each."""
