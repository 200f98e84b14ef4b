"""A run's model on its processes: what each holds of it, trains it with, and tells the others.

`train_run.py` calls it once model and plan are there. Like it, this module sees a `Setting`.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from penstock.compiler.pipeline import pieces_per_stage
from penstock.compiler.plan import Plan
from penstock.models.initialization import every
from penstock.models.transformer import Transformer
from penstock.parallel.mesh import Mesh, coordinates
from penstock.parallel.parts import WHOLE, Part
from penstock.parallel.replicas import Replicas
from penstock.parallel.stage import Stage, holds, layers_of_pieces, named_parameters
from penstock.saving import AsyncSaver
from penstock.train_setting import Setting
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


def divide(setting: Setting, model: Transformer, masters: Mapping[str, Tensor]) -> Parts:
    """Leave this process its part of the model; `masters` are float32 weights by name."""
    c, chosen, world = setting.config, setting.plan, setting.world
    timeout = c.launch.timeout_seconds
    mesh = Mesh.of(world, chosen.stages, timeout)
    if chosen.stages > 1:
        return _stages(setting, model, masters, mesh)
    replicas = Replicas([model], mesh.replicas, chosen.shard)
    optimizer = make_optimizer(
        model.named_parameters(), c.optimizer, masters=replicas.rows_of(masters)
    )
    passes = Passes(
        model, optimizer, replicas, z_loss=c.train.z_loss, accumulation=chosen.accumulation
    )
    if replicas.is_divided:
        part = Part(world.rank, world.size, world.token, timeout)
        return Parts(passes, optimizer, replicas, _saver(setting, part))
    return Parts(passes, optimizer, replicas, _saver(setting, WHOLE) if world.is_first else None)


def _stages(
    setting: Setting, model: Transformer, masters: Mapping[str, Tensor], mesh: Mesh
) -> Parts:
    """The same for one stage of several."""
    # Torch's pipelines take half a second to load.
    from penstock.parallel.pipeline import Pipeline  # noqa: PLC0415
    from penstock.parallel.stage_replicas import StageReplicas  # noqa: PLC0415

    c, chosen, world = setting.config, setting.plan, setting.world
    line = mesh.stages
    pieces = _pieces(chosen)
    own = [
        Stage(model, pieces, index, c.train.z_loss)
        for index in range(line.rank, len(pieces), line.size)
    ]
    replicas = StageReplicas(mesh, own, chosen.shard, is_tied=chosen.architecture.tie_embeddings)
    optimizer = make_optimizer(
        named_parameters(own),
        c.optimizer,
        masters=replicas.rows_of(masters),
        layers=chosen.architecture.layers,
    )
    passes = Pipeline(
        own,
        line,
        schedule=chosen.schedule,
        micro_batches=chosen.accumulation,
        names=optimizer.names,
        shard=replicas.shard,
    )
    timeout = c.launch.timeout_seconds
    if replicas.is_divided:  # Replicas of one stage are neighbours, so are their rows.
        saver = _saver(setting, Part(world.rank, world.size, world.token, timeout))
    elif mesh.replicas.rank == 0:
        saver = _saver(setting, Part(line.rank, line.size, world.token, timeout))
    else:
        saver = None
    return Parts(passes, optimizer, replicas, saver)


def _saver(setting: Setting, part: Part) -> AsyncSaver:
    """What writes checkpoints here: all of each, or a part of it."""
    return AsyncSaver(setting.run.checkpoints, setting.config.checkpoint.keep, part)
