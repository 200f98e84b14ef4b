"""What cannot be trained with what, refused before anything is made; each refusal names its key.

`train_setting.py` calls it. It must never import torch.
"""

import importlib.util

from penstock.compiler.plan import Plan
from penstock.config.optimizer import WHOLE_MATRICES
from penstock.config.schema import Config
from penstock.errors import ConfigError


def require_parts_here(config: Config, plan: Plan) -> None:
    """Refuse what does not go with blocks divided among processes."""
    if plan.tensor == 1:
        return
    name = config.optimizer.name
    if name in WHOLE_MATRICES:
        raise ConfigError(
            f"optimizer.name={name} does not go with plan.tensor={plan.tensor}: it needs whole "
            "matrices",
            where="optimizer.name",
            do="use another, or leave plan.tensor out",
        )


def require_engine_here(config: Config, plan: Plan) -> None:
    """Refuse what does not go with DeepSpeed's engine, and that where it is not installed."""
    if config.plan.engine == "torch":
        return
    # Of each key: whether it is in the way, and how.
    asked: dict[str, tuple[bool, str]] = {
        "plan.stages": (plan.stages > 1, "it trains whole models"),
        "plan.tensor": (plan.tensor > 1, "it trains whole blocks"),
        "lora": (plan.architecture.adapter is not None, "it trains all weights"),
        "train.freeze": (bool(config.train.freeze), "it trains all weights"),
        "model": (
            plan.architecture.generic is not None,
            f"{plan.architecture.family} is not one of Penstock's own families",
        ),
        "optimizer.name": (config.optimizer.name != "adamw", "it is given AdamW"),
        "plan.shard": (
            plan.shard == "none" and plan.compute == "bf16",
            "its stage 0 has no float32 masters of bf16 weights",
        ),
        # Without kernels gradients were wrong from the second step on (DeepSpeed 0.19.8).
        "plan.recompute": (
            plan.shard == "weights"
            and config.plan.recompute not in (None, "none", "blocks")
            and config.executable is None,
            "with plan.shard=weights blocks are computed again as a whole",
        ),
    }
    remedies = {
        "plan.shard": "use plan.shard=optimizer, or precision.compute=fp32",
        "plan.recompute": "use plan.recompute=blocks, or leave it out",
    }
    for key in (key for key, (is_asked, _) in asked.items() if is_asked):
        raise ConfigError(
            f"{key} does not go with plan.engine=deepspeed: {asked[key][1]}",
            where=key,
            do=remedies.get(key, "change it, or leave plan.engine out"),
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed is not installed",
            where="plan.engine=deepspeed",
            do="pip install 'penstock[deepspeed]', or leave plan.engine out: plan.shard is torch's "
            "own then",
        )


def require_stages_here(plan: Plan) -> None:
    """Refuse what does not go with a pipeline, or with its schedule."""
    if plan.stages == 1:
        return
    schedule, count = plan.schedule, plan.accumulation
    shortest = min(plan.layers_per_stage)
    # Of each key: whether it is in the way, and how.
    asked: dict[str, tuple[bool, str]] = {
        "batch.size": (
            schedule == "1f1b" and count < plan.stages,
            f"1f1b needs {plan.stages} micro-batches or more, a step has {count}",
        ),
        "plan.layers_per_stage": (
            schedule == "interleaved" and shortest < 2,
            f"interleaved needs two blocks on every stage, one has {shortest}",
        ),
    }
    for key in (key for key, (is_asked, _) in asked.items() if is_asked):
        raise ConfigError(
            f"{key} does not go with plan.stages={plan.stages}: {asked[key][1]}",
            where=key,
            do="change it, or leave plan.stages out",
        )
