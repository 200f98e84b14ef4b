"""What a user asks of a plan, checked before anything is laid out; each refusal names its key.

`compiler/planner.py` calls it. It must never import torch.
"""

import math

from penstock.compiler.stages import check_layers_per_stage, check_stages
from penstock.config.planning import PlanSection
from penstock.config.schema import BatchSection
from penstock.errors import ConfigError
from penstock.hardware.target import Target
from penstock.models.adapter import NF4_GROUP, held_base
from penstock.models.architecture import WEIGHT_GROUP, Architecture


def check_shapes(
    architecture: Architecture, batch: BatchSection, plan: PlanSection, sequence_length: int
) -> None:
    """Refuse what cannot be, naming the key."""
    check_length(architecture, sequence_length)
    check_parts(architecture, plan)
    unit = batch.micro * plan.replicas
    if batch.size is not None and batch.size % unit:
        replicas = f" × plan.replicas={plan.replicas}" if plan.replicas > 1 else ""
        raise ConfigError(
            f"batch.size={batch.size} is not a multiple of batch.micro={batch.micro}{replicas}",
            where="batch.size",
            do=f"use {-(-batch.size // unit) * unit}",
        )
    if batch.size is not None and batch.size != unit * (plan.micro_batches or batch.size // unit):
        raise ConfigError(
            f"batch.size={batch.size} is not plan.micro_batches={plan.micro_batches} × "
            f"batch.micro={batch.micro} × plan.replicas={plan.replicas}",
            where="plan.micro_batches",
            do="give one of batch.size and plan.micro_batches",
        )


def check_parts(architecture: Architecture, plan: PlanSection) -> None:
    """Refuse to divide blocks where heads or the MLP's width do not divide evenly."""
    a = architecture
    sizes = {"heads": a.heads, "kv_heads": a.heads // a.group_size, "mlp_size": a.mlp_size}
    for name, size in sizes.items():
        if size % plan.tensor:
            raise ConfigError(
                f"model.{name}={size} cannot be divided by plan.tensor={plan.tensor}",
                where="plan.tensor",
                do=f"use a divisor of {math.gcd(*sizes.values())}",
            )
    base = held_base(a.adapter)
    if base is not None and plan.tensor > 1:
        _check_groups(a, plan.tensor, base)


def _check_groups(architecture: Architecture, parts: int, base: str) -> None:
    """Refuse to divide weights in few bits that share a scale."""
    group = {"int8": WEIGHT_GROUP, "nf4": NF4_GROUP}[base]
    for name in ("hidden_size", "mlp_size"):
        size = getattr(architecture, name)
        if size % (parts * group):
            raise ConfigError(
                f"lora.base={base} has a scale for every {group} weights of a row, of which "
                f"plan.tensor={parts} would divide some: model.{name}={size}",
                where="lora.base",
                do=f"leave it out, or use a model.{name} that {parts * group} divides",
            )


def check_objective(architecture: Architecture, objective: str, mode: str) -> None:
    """Refuse what a model that sees both ways, or only what is before, cannot learn or do."""
    kind = "causal" if architecture.is_causal else "masked"
    if objective not in ("auto", kind):
        raise ConfigError(
            f"{architecture.family} is a {kind} language model: it does not train with "
            f"train.objective={objective}",
            where="train.objective",
            do="leave it out, or choose a model of the other kind",
        )
    if mode == "generate":
        require_causal(architecture)


def check_generic(architecture: Architecture, plan: PlanSection, attention: str) -> None:
    """Refuse what a model that `transformers` computes has no part in."""
    if architecture.generic is None:
        return
    asked = {
        "data.attention": attention != "full",
        "plan.stages": (plan.stages or 1) > 1,
        "plan.recompute": plan.recompute not in (None, "none"),
        "plan.shard": plan.shard != "none",
        "plan.tensor": plan.tensor > 1,
    }
    for key in (key for key, is_asked in asked.items() if is_asked):
        raise ConfigError(
            f"{key} is for Penstock's own families; {architecture.family} runs as transformers "
            "computes it",
            where=key,
            do="leave it out",
        )


def require_causal(architecture: Architecture) -> None:
    """Refuse to generate with a model that fills in masked tokens."""
    if not architecture.is_causal:
        raise ConfigError(
            f"{architecture.family} is a masked language model: it generates no text",
            where="model",
            do="use a causal model, or evaluate this one",
        )
    if architecture.generic is not None:
        raise ConfigError(
            f"{architecture.family} is not one of Penstock's families: it generates no text here",
            where="model",
            do="write it with `convert checkpoint`, and generate with transformers",
        )


def check_length(architecture: Architecture, sequence_length: int) -> None:
    """Refuse sequences that the model has no positions for."""
    if sequence_length > architecture.max_positions:
        raise ConfigError(
            f"data.sequence_length={sequence_length} is longer than the model's "
            f"{architecture.max_positions} positions",
            where="data.sequence_length",
            do=f"use at most {architecture.max_positions}, or raise model.max_positions",
        )


def head_stands_apart(architecture: Architecture, device: str, stages: int) -> bool:
    """Whether the head is the first device's, since its weights are the embedding's: elsewhere than
    on CPUs and GPUs, where the last one has a copy of them.
    """
    return architecture.tie_embeddings and stages > 1 and device not in ("cpu", "cuda")


def require_stages(
    architecture: Architecture, plan: PlanSection, accumulation: int, device: str
) -> int:
    """Number of stages, checked against the model and the schedule."""
    given, layers = plan.layers_per_stage, architecture.layers
    if given is not None:
        tied = head_stands_apart(architecture, device, len(given))
        check_layers_per_stage(given, layers, plan.stages, tied=tied)
    stages = len(given or ()) or plan.stages or 1
    check_stages(stages, layers)
    if stages > 1 and architecture.shared_layers:
        raise ConfigError(
            f"the layers of {architecture.family} are one block: it cannot be cut into stages",
            where="plan.stages",
            do="leave plan.stages out; plan.replicas divides the batch instead",
        )
    if plan.schedule in ("interleaved", "zero-bubble") and stages > 1 and accumulation % stages:
        raise ConfigError(
            f"{accumulation} micro-batches are not a multiple of {stages} stages",
            where="plan.schedule",
            do=f"{plan.schedule} needs one: change batch.size, or use plan.schedule=1f1b",
        )
    return stages


def with_devices(target: Target, stages: int, replicas: int, tensor: int = 1) -> Target:
    """The target, or equal parts of it where it is one CPU; a refusal where it is too small."""
    wanted = stages * replicas * tensor
    if target.devices >= wanted:
        return target
    if target.device == "cpu" and target.devices == 1:
        return target.shared_by(wanted)
    parts = f" × plan.tensor={tensor}" if tensor > 1 else ""
    raise ConfigError(
        f"plan.stages={stages} × plan.replicas={replicas}{parts} needs {wanted} devices, "
        f"{target.name} has {target.devices}",
        where="plan.stages" if stages > 1 else "plan.replicas",
        do=f"use at most {target.devices} in all, or another plan.target",
    )
