"""What a training run is, decided and checked before its folder is touched.

`train_run.py` settles first, and takes everything from the `Setting` after. Like it, this module
sees the whole `Config`.
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import torch

from penstock import jobs, planning
from penstock.checkpoint import CheckpointState
from penstock.compiler.executable import Executable
from penstock.compiler.plan import Plan
from penstock.config.schema import Config
from penstock.data.grouping import grouped
from penstock.data.loader import Loader
from penstock.data.objective import Objective, objective_for
from penstock.data.training_data import TrainingData
from penstock.errors import ConfigError
from penstock.exports import started_from
from penstock.files import canonical_json
from penstock.parallel.mesh import coordinates
from penstock.parallel.world import World
from penstock.train_demands import require_engine_here, require_parts_here, require_stages_here
from penstock.training.run_folder import RunFolder
from penstock.training.schedule import check_schedule


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is decided before the run folder is touched."""

    config: Config
    world: World
    run: RunFolder
    plan: Plan
    data: TrainingData
    executable: Executable | None
    loader: Loader
    total_steps: int
    identity: dict[str, Any]


def require_same(setting: Setting, resume: CheckpointState | None) -> None:
    """Refuse processes that would not train the same job."""
    c, executable = setting.config, setting.executable
    setting.world.require_same(
        {
            "configuration": _short_hash(c.model_dump(mode="json", exclude={"launch"})),
            "dataset": _short_hash([setting.data.tokenizer_sha256, setting.loader.samples.count]),
            "executable": "none" if executable is None else executable.sha256[:16],
            "checkpoint": "none" if resume is None else f"step {resume.step}",
            "torch": torch.__version__,
        }
    )


def _short_hash(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def settle(config: Config, world: World) -> Setting:
    """Open and check everything the job needs, before anything is written."""
    run = jobs.run_folder(config)
    executable = None
    if config.executable is not None:
        executable = Executable.open(config.executable, config.trust)
        config = planning.follow_executable(config, executable.plan)
    data = planning.open_training_data(config)
    chosen = planning.plan_of(config, data)
    planning.require_tokenizer_of_model(config, data)
    config = started_from(config)
    planning.require_here(config, chosen, world.size)
    require_stages_here(chosen)
    require_parts_here(config, chosen)
    require_engine_here(config, chosen)
    planning.require_fit(chosen)
    samples = data.training(config.data.split, chosen.sequence_length, config.seed)
    if config.data.group_by_length:
        _require_no_kernels(config, chosen)
        samples = grouped(samples, chosen.size, config.seed)
    loader = Loader(
        samples,
        sequence_length=chosen.sequence_length,
        batch_size=chosen.size,
        micro=chosen.micro,
        objective=objective(config, chosen, data),
        share=(coordinates(world.place, chosen.stages, chosen.tensor)[0], chosen.replicas),
    )
    total_steps = _total_steps(config, loader)
    _check_patience(config)
    check_schedule(config.schedule, config.optimizer.lr, total_steps)
    identity: dict[str, Any] = {
        "architecture": dataclasses.asdict(chosen.architecture),
        "tokenizer": data.tokenizer_sha256,
    }
    if config.data.group_by_length:
        identity["group_by_length"] = chosen.size
    if config.train.freeze:
        identity["frozen"] = config.train.freeze
    if config.train.freeze or chosen.architecture.adapter is not None:
        config = _with_whole_path(config)
        identity["base"] = jobs.base_identity(config)
    data.announce(config.data.split, chosen.sequence_length)
    return Setting(config, world, run, chosen, data, executable, loader, total_steps, identity)


def _check_patience(config: Config) -> None:
    """Refuse to wait for validations that there are none of."""
    if config.train.patience is not None and config.train.evaluate_every is None:
        raise ConfigError(
            "train.patience needs validations to count",
            where="train.patience",
            do="set train.evaluate_every",
        )


def _require_no_kernels(config: Config, plan: Plan) -> None:
    """Refuse batches of several lengths where kernels take one."""
    has_kernels = config.compile.mode != "off" or config.executable is not None
    if has_kernels and plan.device == "cpu" and plan.architecture.generic is None:
        raise ConfigError(
            "kernels take batches of one length, groups have their own",
            where="data.group_by_length",
            do="set compile.mode=off and no executable, or leave it out",
        )


def objective(config: Config, chosen: Plan, data: TrainingData) -> Objective:
    """What samples ask of the model."""
    return objective_for(
        data,
        is_causal=chosen.architecture.is_causal,
        by_document=chosen.attention == "document",
        probability=config.train.mask_probability,
        seed=config.seed,
    )


def _with_whole_path(config: Config) -> Config:
    """The same with `model.from` named so that it is found from anywhere: the run has no copy."""
    given = config.model.from_
    if given is None or not Path(given).expanduser().exists():
        return config
    whole = str(Path(given).expanduser().resolve())
    return config.model_copy(update={"model": config.model.model_copy(update={"from_": whole})})


def _total_steps(config: Config, loader: Loader) -> int:
    """Length of the run from exactly one of steps, epochs, tokens."""
    t = config.train
    given = [name for name in ("steps", "epochs", "tokens") if getattr(t, name) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"the run's length is given {len(given)} times",
            where="train",
            do="set exactly one of train.steps, train.epochs, train.tokens",
        )
    if t.steps is not None:
        return t.steps
    if t.epochs is not None:
        return max(1, math.ceil(t.epochs * loader.epoch / loader.batch_size))
    return max(1, math.ceil((t.tokens or 1) / (loader.batch_size * loader.sequence_length)))
