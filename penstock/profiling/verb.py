"""`penstock profile`: a job recorded in this process, or in each of several, and what is written.

`api.profile` calls it. Processes are started, and divide the job, as those of `train`.
"""

import dataclasses
import gzip
import json
import tempfile
from pathlib import Path

from penstock import planning
from penstock.compiler.plan import Plan
from penstock.compiler.probe import Speeds
from penstock.config.schema import Config
from penstock.errors import ConfigError
from penstock.files import atomic_write
from penstock.parallel.environment import find_place
from penstock.parallel.world import World
from penstock.profiling.processes import read_processes, trace_name
from penstock.profiling.report import ProfileResult, write_profile
from penstock.profiling.session import Recording, record, record_training


def profile_run(config: Config) -> ProfileResult | None:
    """Record a job and report it in `out`; None in a process that another reports for.

    Raises:
        UserError: what `train` and `generate` refuse; what is not recorded.
    """
    if config.out is None:
        raise ConfigError("no folder to write", where="out", do="set out=FOLDER")
    if config.plan.engine != "torch":
        raise ConfigError(
            "profile records torch's own steps", where="plan.engine", do="leave plan.engine out"
        )
    folder, place = Path(config.out), find_place()
    wanted = config.launch.processes * config.launch.hosts
    if config.mode != "train" or max(place.size, wanted) == 1:
        _require_one(config, max(place.size, wanted))
        return write_profile(record(config), folder)
    if place.size == 1:
        # Torch's launcher takes half a second to load.
        from penstock.parallel.launch import LaunchError, run_in_processes  # noqa: PLC0415

        # What has failed once would fail again: there is no checkpoint to go on from.
        launch = config.launch.model_copy(update={"restarts": 0})
        config = config.model_copy(update={"launch": launch})
        if not run_in_processes("profile", config, {}, "nothing was recorded"):
            raise LaunchError("the recording was stopped", do="start the same command again")
        return ProfileResult.read(folder)
    world = World(place)
    config = planning.with_replicas(config, world.size)
    device = planning.device_of(config)
    with world.joined(device, config.launch.timeout_seconds, folder / "stacks"):
        recording = record_together(config, world, folder)
        return None if recording is None else write_profile(recording, folder)


def _require_one(config: Config, processes: int) -> None:
    """Refuse several processes for what one does alone."""
    if processes > 1 and config.mode == "generate":
        raise ConfigError(
            "text is generated, and profiled, by one process",
            where="launch.processes",
            do="leave launch out, or use mode=train",
        )


def record_together(config: Config, world: World, folder: Path) -> Recording | None:
    """Record a training job of several processes, of which this is one; all of them, for the first.

    Each writes its own trace into `folder`, which all must see.

    Raises:
        UserError: what `train` refuses.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-profile-") as temporary:
        own, held = record_training(config, world, Path(temporary))
    folder.mkdir(parents=True, exist_ok=True)
    name = trace_name(world.rank, world.size)
    atomic_write(folder / name, gzip.compress(own.trace, mtime=0))
    work = {region: dataclasses.astuple(work) for region, work in own.work.items()}
    said = {"work": work, "peak_memory_bytes": own.peak_memory_bytes}
    told = world.united({str(world.rank): said})
    if not world.is_first:
        return None
    processes, trace = read_processes(folder, world.size, told)
    # The others' threads have the rest of the processor.
    share = 1 if own.device == "cuda" else world.place.local_size
    return dataclasses.replace(
        own,
        facts={**own.facts, "processes": _described(held, world.size)},
        times=processes[0].times,
        speeds=_shared(own.speeds, share),
        trace=json.dumps(trace).encode(),
        processes=processes,
    )


def _described(plan: Plan, size: int) -> str:
    """How the plan divides a job among its processes."""
    parts = {"replicas": plan.replicas, "stages": plan.stages, "parts of blocks": plan.tensor}
    said = [f"{count} {name}" for name, count in parts.items() if count > 1]
    said += [f"sharded: {plan.shard}"] * (plan.shard != "none")
    return f"{size} ({', '.join(said)})"


def _shared(speeds: Speeds, count: int) -> Speeds:
    """Those of one of `count` processes that share a processor."""
    return dataclasses.replace(
        speeds,
        bf16_flops=speeds.bf16_flops / count,
        fp32_flops=speeds.fp32_flops / count,
        bandwidth_bytes_per_second=speeds.bandwidth_bytes_per_second / count,
    )
