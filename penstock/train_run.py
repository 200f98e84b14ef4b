"""One training run from config to summary: everything `api.train` sets up, and takes down.

The loop itself is `training/trainer.py`; this module gathers what it works with and
records what came out. With `api.py` and `jobs.py` it is the only one that sees the whole `Config`.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from penstock import jobs, planning, runs
from penstock.checkpoint import CheckpointState, load_newest
from penstock.compiler.kernels import CompiledKernel
from penstock.compiler.plan import Plan
from penstock.compiler.probe import measured_speeds
from penstock.compiler.update import ADAMW, SQUARES
from penstock.config.load import dump_config
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.data.loader import Loader
from penstock.data.sample_log import SampleLog
from penstock.files import atomic_write, canonical_json
from penstock.hardware.process import loaded_openmp
from penstock.models.families import hf_config
from penstock.parallel.environment import find_place, inherited_origins
from penstock.parallel.mesh import coordinates
from penstock.parallel.replicas import Replicas
from penstock.parallel.world import World
from penstock.report.summary import RunSummary, environment
from penstock.train_parts import divide, held_here
from penstock.train_setting import Setting, objective, require_same, settle
from penstock.training.metrics import MetricsLog, peak_memory_bytes
from penstock.training.trainer import Trainer, TrainingJob
from penstock.training.validation import Validation


def train_run(config: Config, origins: Mapping[str, str]) -> RunSummary:
    """Train, or go on training; see `api.train`. Starts several processes where that is asked
    for; one of several does its part.
    """
    place, wanted = find_place(), config.launch.processes * config.launch.hosts
    if place.size == 1 and wanted > 1:
        # Torch's launcher takes half a second to load.
        from penstock.parallel.launch import run_in_processes  # noqa: PLC0415

        run = jobs.run_folder(config)
        run_in_processes("train", config, origins)
        return RunSummary.read(run.path)
    world = World(place)
    config = planning.with_replicas(config, world.size)
    device, stacks = planning.device_of(config), jobs.run_folder(config).stacks
    with world.joined(device, config.launch.timeout_seconds, stacks):
        return _train(settle(config, world), inherited_origins() or origins)


def _train(setting: Setting, origins: Mapping[str, str]) -> RunSummary:
    """Train what is settled; all processes compute, the first leaves what the run is."""
    run, chosen, world = setting.run, setting.plan, setting.world
    with run.lock() if world.is_first else contextlib.nullcontext():
        resume = run.resume_state(setting.config.checkpoint.resume, held_here(setting))
        require_same(setting, resume)
        if resume is not None:
            finished = _check_resumed(setting, resume)
            if finished is not None:
                return finished
        keep = run.executable if world.is_first else None
        kernels = jobs.training_kernels(setting.config, chosen, setting.executable, run, keep)
        if world.is_first:
            _write_provenance(setting, origins)
        _check_openmp()
        job = _job(setting, kernels, resume)
        setting.loader.log = _sample_log(setting, resume)
        if resume is not None:
            resume = dataclasses.replace(resume, tensors=job.replicas.rows_of(resume.tensors))
        trainer = Trainer(job, resume)
        del resume  # Masters and moments are in the optimizer now; twice is too much to hold.
        with (
            contextlib.closing(job.saver) if job.saver else contextlib.nullcontext(),
            job.metrics or contextlib.nullcontext(),
        ):
            trainer.run()
        summary = RunSummary(run.path, _results(setting, trainer, compiled=kernels is not None))
        if not world.is_first:
            return summary
        summary.write()
        if setting.config.train.report:
            # It loads matplotlib: 30 MiB and a good part of a second that no step needs.
            from penstock.report.page import write_report  # noqa: PLC0415

            summary.report = write_report(run.path)
    return summary


def prepare_job(config: Config, world: World) -> tuple[Plan, TrainingJob, bool]:
    """A plan and a job from fresh weights, before its first step, and whether it has kernels.

    For whoever makes steps without a trainer; the run folder must be new, and each process has one
    of its own.
    """
    setting = settle(config, world)
    alike = setting.config.model_copy(update={"run": None})
    require_same(dataclasses.replace(setting, config=alike), None)
    chosen, run = setting.plan, setting.run
    kernels = jobs.training_kernels(setting.config, chosen, setting.executable, run, None)
    return chosen, _job(setting, kernels, None), kernels is not None


def _check_resumed(setting: Setting, resume: CheckpointState) -> RunSummary | None:
    """Refuse another job's checkpoint; the summary, if there is nothing left to train."""
    where = setting.run.path
    trained_with = str(resume.values["identity"]["tokenizer"])
    runs.require_same_tokenizer(trained_with, setting.data, f"the run {where}")
    runs.require_same_job(setting.identity, resume)
    finished = RunSummary.read(where)
    if resume.step >= setting.total_steps and finished.values.get("complete"):
        get_console().info(f"{where} is trained to step {resume.step} already: reused")
        return finished
    get_console().info(f"resuming {where} after step {resume.step}")
    return None


def _job(
    setting: Setting,
    kernels: dict[str, CompiledKernel] | None,
    resume: CheckpointState | None,
) -> TrainingJob:
    """Model, optimizer and everything else the trainer works with."""
    c, chosen, world = setting.config, setting.plan, setting.world
    part, holds = world.rank % chosen.tensor, held_here(setting)
    model, masters = jobs.new_model(c, chosen, kernels, part=part, holds=holds)
    speeds = measured_speeds(chosen.device)
    parts = divide(setting, model, masters)
    if kernels is not None and ADAMW in kernels:
        parts.optimizer.use_kernels(kernels[ADAMW].run, kernels[SQUARES].run)
    if parts.saver is not None:
        parts.optimizer.before_step = parts.saver.wait_for_copy
    return TrainingJob(
        **parts._asdict(),
        restore=lambda: _newest(setting, parts.replicas),
        loader=setting.loader,
        validation=_validation(setting),
        train=c.train,
        schedule=c.schedule,
        checkpoint=c.checkpoint,
        lr=c.optimizer.lr,
        seed=c.seed,
        total_steps=setting.total_steps,
        flops_per_token=chosen.flops_per_token,
        peak_flops=(speeds.bf16_flops if chosen.compute == "bf16" else speeds.fp32_flops)
        * (world.place.hosts if chosen.device == "cpu" else world.size),
        world=world,
        metrics=_metrics(setting, resume) if world.is_first else None,
        identity=setting.identity,
    )


def _newest(setting: Setting, replicas: Replicas) -> CheckpointState | None:
    """The newest checkpoint, this process's rows of it."""
    state = load_newest(setting.run.checkpoints, wanted=held_here(setting))
    if state is None:
        return None
    return dataclasses.replace(state, tensors=replicas.rows_of(state.tensors))


def _metrics(setting: Setting, resume: CheckpointState | None) -> MetricsLog:
    run = setting.run
    return MetricsLog(
        run.metrics,
        resume_step=0 if resume is None else resume.step,
        tensorboard=run.tensorboard if setting.config.train.tensorboard else None,
    )


def _sample_log(setting: Setting, resume: CheckpointState | None) -> SampleLog | None:
    """Where this process logs its samples, if it does; all processes of a replica have the same."""
    chosen = setting.plan
    replica, stage = coordinates(setting.world.place, chosen.stages, chosen.tensor)
    is_first = stage == 0 and setting.world.rank % chosen.tensor == 0
    if not setting.config.train.log_samples or not is_first:
        return None
    position = 0 if resume is None else int(resume.values["totals"]["position"])
    return SampleLog(setting.run.samples, position, (replica, chosen.replicas))


def _validation(setting: Setting) -> list[Validation]:
    """A fixed choice of sequences of each validation split that has any."""
    config, chosen = setting.config, setting.plan
    parts = setting.data.validation(
        config.data.validation_split, chosen.sequence_length, config.train.evaluate_sequences
    )
    return [
        Validation(
            part.name,
            part.weight,
            Loader(
                part.samples,
                sequence_length=chosen.sequence_length,
                batch_size=chosen.micro,
                micro=chosen.micro,
                objective=objective(config, chosen, setting.data),
            ),
        )
        for part in parts
    ]


def _check_openmp() -> None:
    """Two OpenMP runtimes spin on the same cores: kernels were three times slower, measured."""
    if len(loaded_openmp()) > 1:
        get_console().warning(
            f"more than one OpenMP runtime is loaded ({', '.join(loaded_openmp())}): training will "
            "be several times slower; look for LD_PRELOAD or another library that brings its own"
        )


def _write_provenance(setting: Setting, origins: Mapping[str, str]) -> None:
    """What the run is made of: resolved config, model config, plan, tokenizer."""
    run, architecture = setting.run, setting.plan.architecture
    tokenizer = setting.data.tokenizer()
    described = hf_config(architecture, tokenizer.end_of_text, tokenizer.begin)
    atomic_write(run.config, dump_config(setting.config, origins))
    atomic_write(run.path / "config.json", json.dumps(described, indent=2))
    atomic_write(run.plan, json.dumps(setting.plan.to_json(), indent=1))
    tokenizer.save(run.tokenizer)


def _left_out(trainer: Trainer) -> dict[str, int]:
    """What all processes have left out of a stream, each part of the text once."""
    parts: dict[str, dict[str, int]] = trainer.data_state.get("stream", {}).get("left_out", {})
    return dict(sorted(sum(map(Counter, parts.values()), Counter[str]()).items()))


def _results(setting: Setting, trainer: Trainer, *, compiled: bool) -> dict[str, Any]:
    """The content of summary.json; an earlier evaluation stays in it."""
    totals, chosen = trainer.totals, setting.plan
    before = RunSummary.read(setting.run.path).values
    config = canonical_json(setting.config.model_dump(mode="json"))
    is_complete = totals.step >= setting.total_steps or totals.has_stopped
    return {
        **{name: before[name] for name in ("evaluation", "compressors", "tasks") if name in before},
        "complete": is_complete,
        "status": "complete" if is_complete else "resumable",
        "steps": totals.step,
        "tokens": totals.tokens,
        "seconds": round(totals.seconds, 3),
        "loss": {"final": totals.last_loss, "best_validation": totals.best_loss},
        "throughput": {
            "tokens_per_second": trainer.throughput.mean_tokens_per_second,
            "mfu": trainer.throughput.mean_mfu,
            "peak_flops": trainer.job.peak_flops,
        },
        "data": {
            "waiting": trainer.throughput.waiting_share,
            "samples": setting.loader.samples.drawn(totals.position),
            "left_out": _left_out(trainer),
        },
        "skipped_steps": trainer.guard.skipped,
        "failed_saves": totals.failed_saves,
        "memory_bytes": peak_memory_bytes(trainer.device),
        "predicted_memory_bytes": chosen.memory["total"],
        "parameters": chosen.architecture.parameter_count(),
        "trained_parameters": chosen.architecture.trained_parameters(),
        "compiled": compiled,
        "plan": chosen.json(),
        "config_hash": hashlib.sha256(config.encode()).hexdigest(),
        **environment(),
    }
