"""One training run from config to summary: everything `api.train` sets up, and takes down.

The loop itself is `training/trainer.py`; this module gathers what it works with and
records what came out. With `api.py` and `jobs.py` it is the only one that sees the whole `Config`.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock import jobs, planning, runs
from penstock.checkpoint import AsyncSaver, CheckpointState
from penstock.compiler.executable import Executable
from penstock.compiler.plan import Plan
from penstock.compiler.probe import measured_speeds
from penstock.compiler.runtime import CompiledKernel
from penstock.config.load import dump_config
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.data.loader import Loader
from penstock.data.objective import Objective
from penstock.data.training_data import TrainingData
from penstock.errors import ConfigError
from penstock.files import atomic_write, canonical_json
from penstock.hardware.process import loaded_openmp
from penstock.models.families import FAMILIES
from penstock.report.summary import RunSummary, environment
from penstock.training.adamw_8bit import AdamW8bit
from penstock.training.metrics import MetricsLog, peak_memory_bytes
from penstock.training.muon import Muon
from penstock.training.optimizer import AdamW
from penstock.training.run_folder import RunFolder
from penstock.training.schedule import check_schedule
from penstock.training.trainer import Trainer, TrainingJob
from penstock.training.validation import Validation

OPTIMIZERS = {"adamw": AdamW, "adamw_8bit": AdamW8bit, "muon": Muon}
"""optimizer.name → class."""


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What is decided before the run folder is touched."""

    config: Config
    run: RunFolder
    plan: Plan
    data: TrainingData
    executable: Executable | None
    loader: Loader
    total_steps: int
    identity: dict[str, Any]


def train_run(config: Config, origins: Mapping[str, str]) -> RunSummary:
    """Train, or go on training; see `api.train`."""
    setting = _settle(config)
    run, chosen = setting.run, setting.plan
    with run.lock():
        resume = run.resume_state(setting.config.checkpoint.resume)
        if resume is not None:
            finished = _check_resumed(setting, resume)
            if finished is not None:
                return finished
        kernels = jobs.training_kernels(setting.config, chosen, setting.executable, run)
        _write_provenance(setting, origins)
        _check_openmp()
        job = _job(setting, kernels, resume)
        trainer = Trainer(job, resume)
        del resume  # Masters and moments are in the optimizer now; twice is too much to hold.
        with contextlib.closing(job.saver), job.metrics:
            trainer.run()
        summary = RunSummary(run.path, _results(setting, trainer, compiled=kernels is not None))
        summary.write()
        if setting.config.train.report:
            # It loads matplotlib: 30 MiB and a good part of a second that no step needs.
            from penstock.report.page import write_report  # noqa: PLC0415

            summary.report = write_report(run.path)
    return summary


def _settle(config: Config) -> _Setting:
    """Open and check everything the job needs, before anything is written."""
    run = jobs.run_folder(config)
    executable = None
    if config.executable is not None:
        executable = Executable.open(config.executable, config.trust)
        config = planning.follow_executable(config, executable.plan)
    data = planning.open_training_data(config)
    chosen = planning.plan_of(config, data)
    planning.require_here(config, chosen)
    planning.require_fit(chosen)
    loader = Loader(
        data.training(config.data.split, chosen.sequence_length, config.seed),
        sequence_length=chosen.sequence_length,
        batch_size=chosen.size,
        micro=chosen.micro,
        objective=_objective(chosen, data),
    )
    total_steps = _total_steps(config, loader)
    check_schedule(config.schedule, config.optimizer.lr, total_steps)
    identity: dict[str, Any] = {
        "architecture": dataclasses.asdict(chosen.architecture),
        "tokenizer": data.tokenizer_sha256,
    }
    if chosen.architecture.adapter is not None:
        config = _with_whole_path(config)
        identity["base"] = jobs.base_identity(config)
    data.announce(config.data.split, chosen.sequence_length)
    return _Setting(config, run, chosen, data, executable, loader, total_steps, identity)


def _objective(chosen: Plan, data: TrainingData) -> Objective:
    """What samples ask of the model."""
    return Objective(data.end_of_text if chosen.attention == "document" else None)


def _with_whole_path(config: Config) -> Config:
    """The same with `model.from` named so that it is found from anywhere: the run has no copy."""
    given = config.model.from_
    if given is None or not Path(given).expanduser().exists():
        return config
    whole = str(Path(given).expanduser().resolve())
    return config.model_copy(update={"model": config.model.model_copy(update={"from_": whole})})


def _check_resumed(setting: _Setting, resume: CheckpointState) -> RunSummary | None:
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
    setting: _Setting,
    kernels: dict[str, CompiledKernel] | None,
    resume: CheckpointState | None,
) -> TrainingJob:
    """Model, optimizer and everything else the trainer works with."""
    c, run, chosen = setting.config, setting.run, setting.plan
    model, masters = jobs.new_model(c, chosen, kernels)
    make = OPTIMIZERS[c.optimizer.name]
    speeds = measured_speeds(chosen.device)
    return TrainingJob(
        model=model,
        optimizer=make(model.named_parameters(), c.optimizer, masters=masters),
        loader=setting.loader,
        validation=_validation(setting),
        train=c.train,
        schedule=c.schedule,
        checkpoint=c.checkpoint,
        lr=c.optimizer.lr,
        seed=c.seed,
        total_steps=setting.total_steps,
        accumulation=chosen.accumulation,
        flops_per_token=chosen.flops_per_token,
        peak_flops=speeds.bf16_flops if chosen.compute == "bf16" else speeds.fp32_flops,
        saver=AsyncSaver(run.checkpoints, c.checkpoint.keep),
        metrics=MetricsLog(
            run.metrics,
            resume_step=0 if resume is None else resume.step,
            tensorboard=run.tensorboard if c.train.tensorboard else None,
        ),
        identity=setting.identity,
    )


def _validation(setting: _Setting) -> list[Validation]:
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
                objective=_objective(chosen, setting.data),
            ),
        )
        for part in parts
    ]


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


def _check_openmp() -> None:
    """Two OpenMP runtimes spin on the same cores: kernels were three times slower, measured."""
    if len(loaded_openmp()) > 1:
        get_console().warning(
            f"more than one OpenMP runtime is loaded ({', '.join(loaded_openmp())}): training will "
            "be several times slower; look for LD_PRELOAD or another library that brings its own"
        )


def _write_provenance(setting: _Setting, origins: Mapping[str, str]) -> None:
    """What the run is made of: resolved config, model config, plan, tokenizer."""
    run, architecture = setting.run, setting.plan.architecture
    hf_config = FAMILIES[architecture.family].to_hf_config(architecture, setting.data.end_of_text)
    atomic_write(run.config, dump_config(setting.config, origins))
    atomic_write(run.path / "config.json", json.dumps(hf_config, indent=2))
    atomic_write(run.plan, json.dumps(setting.plan.to_json(), indent=1))
    setting.data.tokenizer().save(run.tokenizer)


def _results(setting: _Setting, trainer: Trainer, *, compiled: bool) -> dict[str, Any]:
    """The content of summary.json; an earlier evaluation stays in it."""
    totals, chosen = trainer.totals, setting.plan
    before = RunSummary.read(setting.run.path).values
    config = canonical_json(setting.config.model_dump(mode="json"))
    return {
        **{name: before[name] for name in ("evaluation", "compressors", "tasks") if name in before},
        "complete": totals.step >= setting.total_steps or totals.reached_target,
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
        },
        "skipped_steps": trainer.guard.skipped,
        "memory_bytes": peak_memory_bytes(trainer.device),
        "predicted_memory_bytes": chosen.memory["total"],
        "parameters": chosen.architecture.parameter_count(),
        "trained_parameters": chosen.architecture.trained_parameters(),
        "compiled": compiled,
        "plan": chosen.json(),
        "config_hash": hashlib.sha256(config.encode()).hexdigest(),
        **environment(),
    }
