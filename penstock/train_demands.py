"""What cannot be trained with what, refused before anything is made; each refusal names its key.

`train_setting.py` calls it. It must never import torch.
"""

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
