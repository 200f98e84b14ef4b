"""A run's model on its processes: what each holds of it, trains it with, and tells the others.

`train_run.py` calls it once model and plan are there. Like it, this module sees a `Setting`.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from penstock.compiler.pipeline import pieces_per_stage
from penstock.compiler.plan import Plan
from penstock.models.initialization import every
from penstock.models.transformer import Transformer
from penstock.parallel.deepspeed_engine import Engine, EngineModel, EngineReplicas
from penstock.parallel.mesh import Mesh, coordinates
from penstock.parallel.parts import WHOLE, Part
from penstock.parallel.replicas import Replicas
from penstock.parallel.stage import Stage, holds, layers_of_pieces, named_parameters
from penstock.parallel.tensor import SharedMatrices, TensorReplicas, connect, cuts_of
from penstock.saving import AsyncSaver
from penstock.train_setting import Setting
from penstock.training.deepspeed_optimizer import DeepSpeedAdamW
from penstock.training.optimizers import Optimizer, make_optimizer
from penstock.training.step import Passes

if TYPE_CHECKING:  # It loads torch's pipelines.
    from penstock.parallel.pipeline import Pipeline


class Parts(NamedTuple):
    """What a process works with; see `TrainingJob`."""

    passes: "Passes | Pipeline"
    optimizer: Optimizer
    replicas: Replicas
    saver: AsyncSaver | None


def held_here(setting: Setting) -> Callable[[str], bool]:
    """Whether this process has a parameter, or a tensor of the optimizer, of the whole model."""
    chosen = setting.plan
    if chosen.stages == 1:
        return every
    pieces = _pieces(chosen)
    _, stage = coordinates(setting.world.place, chosen.stages)
    own = range(stage, len(pieces), chosen.stages)
    is_tied = chosen.architecture.tie_embeddings
    return lambda name: holds(name, pieces, own, is_tied=is_tied)


def _pieces(chosen: Plan) -> list[range]:
    """The blocks of every piece of the depth."""
    count = pieces_per_stage(chosen.schedule, chosen.stages)
    return layers_of_pieces(chosen.layers_per_stage, count)


def divide(setting: Setting, model: Transformer, masters: dict[str, Tensor]) -> Parts:
    """Leave this process its part of the model; `masters` are float32 weights by name, and given
    up: afterwards there are none.
    """
    c, chosen, world = setting.config, setting.plan, setting.world
    timeout = c.launch.timeout_seconds
    mesh = Mesh.of(world, chosen.stages, timeout, chosen.tensor)
    if chosen.tensor > 1:
        connect(model, mesh.parts)
    if chosen.stages > 1:
        return _stages(setting, model, masters, mesh)
    if c.plan.engine == "deepspeed":
        return _in_deepspeed(setting, model, masters, mesh)
    replicas = Replicas([model], mesh.replicas, chosen.shard)
    own = replicas.rows_of(masters)
    masters.clear()
    shares = _shares(setting, mesh)
    optimizer = make_optimizer(model.named_parameters(), c.optimizer, masters=own, shares=shares)
    replicas = _with_parts(setting, replicas, mesh)
    passes = Passes(
        model, optimizer, replicas, z_loss=c.train.z_loss, accumulation=chosen.accumulation
    )
    return Parts(passes, optimizer, replicas, _saver(setting, replicas, mesh))


def _stages(setting: Setting, model: Transformer, masters: dict[str, Tensor], mesh: Mesh) -> Parts:
    """The same for one stage of several."""
    # Torch's pipelines take half a second to load.
    from penstock.parallel.pipeline import Pipeline  # noqa: PLC0415
    from penstock.parallel.stage_replicas import StageReplicas  # noqa: PLC0415

    c, chosen = setting.config, setting.plan
    line = mesh.stages
    pieces = _pieces(chosen)
    own = [
        Stage(model, pieces, index, c.train.z_loss)
        for index in range(line.rank, len(pieces), line.size)
    ]
    replicas = StageReplicas(mesh, own, chosen.shard, is_tied=chosen.architecture.tie_embeddings)
    exact = replicas.rows_of(masters)
    masters.clear()
    optimizer = make_optimizer(
        named_parameters(own),
        c.optimizer,
        masters=exact,
        layers=chosen.architecture.layers,
        shares=_shares(setting, mesh),
    )
    passes = Pipeline(
        own,
        line,
        schedule=chosen.schedule,
        micro_batches=chosen.accumulation,
        names=optimizer.names,
        shard=replicas.shard,
    )
    replicas = _with_parts(setting, replicas, mesh)
    return Parts(passes, optimizer, replicas, _saver(setting, replicas, mesh))


def _shares(setting: Setting, mesh: Mesh) -> SharedMatrices | None:
    """How an optimizer comes by whole matrices, where blocks are divided."""
    if setting.plan.tensor == 1:
        return None
    return SharedMatrices(mesh.parts, setting.plan.architecture)


def _in_deepspeed(
    setting: Setting, model: Transformer, masters: dict[str, Tensor], mesh: Mesh
) -> Parts:
    """The same for a model in DeepSpeed's engine."""
    c, chosen = setting.config, setting.plan
    start = functools.partial(
        Engine,
        model,
        world=setting.world,
        shard=chosen.shard,
        micro=chosen.micro,
        accumulation=chosen.accumulation,
        clip=c.optimizer.clip,
    )
    optimizer = DeepSpeedAdamW(model.named_parameters(), c.optimizer, start, masters)
    masters.clear()
    replicas = EngineReplicas(optimizer.engine, mesh.replicas, chosen.shard)
    passes = Passes(
        EngineModel(optimizer.engine),
        optimizer,
        replicas,
        z_loss=c.train.z_loss,
        accumulation=chosen.accumulation,
    )
    return Parts(passes, optimizer, replicas, _saver(setting, replicas, mesh))


def _with_parts(setting: Setting, replicas: Replicas, mesh: Mesh) -> Replicas:
    """The same, where blocks are divided with the processes that have their other parts."""
    if setting.plan.tensor == 1:
        return replicas
    return TensorReplicas(replicas, mesh.parts, setting.plan.architecture)


def _saver(setting: Setting, replicas: Replicas, mesh: Mesh) -> AsyncSaver | None:
    """What writes checkpoints here: all of each, or a part of it; None: another writes the same."""
    chosen, world, timeout = setting.plan, setting.world, setting.config.launch.timeout_seconds
    if not replicas.is_divided and mesh.replicas.rank > 0:
        return None
    index, count = world.rank, world.size
    if not replicas.is_divided:
        index = mesh.stages.rank * mesh.parts.size + mesh.parts.rank
        count = mesh.stages.size * mesh.parts.size
    part = WHOLE
    if count > 1:
        cuts = cuts_of(chosen.architecture) if chosen.tensor > 1 else {}
        part = Part(index, count, world.token, timeout, mesh.parts.rank, cuts)
    return AsyncSaver(setting.run.checkpoints, setting.config.checkpoint.keep, part)
