"""Run a job for a few steps under torch's profiler, and read off where its time went.

`api.profile` calls it. The job is what `train` or `generate` would run: same model, kernels, data
and optimizer step; nothing of it is kept but the recording.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from penstock import planning, runs
from penstock.compiler.probe import Speeds, measured_speeds
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.errors import ConfigError
from penstock.inference.prompts import read_prompts
from penstock.models.architecture import Architecture
from penstock.models.transformer import Transformer
from penstock.parallel.deepspeed_engine import EngineModel
from penstock.profiling.trace import Times, read_times
from penstock.profiling.work import Work, generation_work, training_work
from penstock.spans import recording, span
from penstock.train_run import prepare_job
from penstock.training.guard import NO_LIMITS
from penstock.training.metrics import peak_memory_bytes
from penstock.training.schedule import learning_rate
from penstock.training.step import Passes, train_step
from penstock.training.trainer import TrainingJob

_TRAINING_STEPS, _GENERATION_TOKENS = 4, 32
"""What is recorded when the user does not say."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """What was recorded of a job."""

    title: str
    facts: dict[str, str]
    times: Times
    work: dict[str, Work]
    """By region, of one step."""
    compute: str
    speeds: Speeds
    predicted_seconds: float | None
    """The plan's, of one step."""
    peak_memory_bytes: int
    trace: bytes
    """Chrome's trace event format, as JSON."""


def record(config: Config) -> Recording:
    """Record the job of a config, training or generation as `mode` says.

    Raises:
        UserError: what `train` and `generate` refuse; a device or mode that is not profiled.
    """
    if planning.device_of(config) != "cpu":
        raise ConfigError(
            "profile books time to regions on CPUs only so far", where="device", do="set device=cpu"
        )
    if config.launch.processes * config.launch.hosts > 1:
        raise ConfigError(
            "profile records one process", where="launch.processes", do="leave launch out"
        )
    if config.plan.engine != "torch":
        raise ConfigError(
            "profile records torch's own steps", where="plan.engine", do="leave plan.engine out"
        )
    if config.mode == "train":
        return _record_training(config)
    if config.mode == "generate":
        return _record_generation(config)
    raise ConfigError(
        f"profile does not record mode={config.mode}", where="mode", do="use train or generate"
    )


def _record_training(config: Config) -> Recording:
    """Some optimizer steps from fresh weights, after some to warm up."""
    section, steps = config.profile, config.profile.steps or _TRAINING_STEPS
    with tempfile.TemporaryDirectory(prefix="penstock-profile-") as folder:
        total = {"steps": section.warmup_steps + steps, "epochs": None, "tokens": None}
        train = config.train.model_copy(update={**total, "tensorboard": False})
        schedule = config.schedule.model_copy(update={"warmup": 0, "decay": None})
        run = str(Path(folder, "run"))
        update = {"run": run, "train": train, "schedule": schedule}
        plan, job, compiled = prepare_job(config.model_copy(update=update))
        if not isinstance(job.passes, Passes) or isinstance(job.passes.model, EngineModel):
            raise AssertionError("torch's steps of one process have no stages")
        _mark(job.passes.model, {"forward": "forward"})
        get_console().info(f"recording {steps} steps after {section.warmup_steps} to warm up")
        with (
            contextlib.closing(job.saver) if job.saver else contextlib.nullcontext(),
            job.metrics or contextlib.nullcontext(),
            contextlib.closing(_stepper(job)) as run_steps,
        ):
            for _ in range(section.warmup_steps):
                next(run_steps)
            with _recorder(Path(folder, "trace.json")) as finish:
                for _ in range(steps):
                    next(run_steps)
            times, trace = finish()
        facts = {
            "model": _describe(plan.architecture),
            "step": f"{plan.accumulation} × {plan.micro} × {plan.sequence_length} tokens",
            "compute": plan.compute,
            "kernels": "compiled" if compiled else "none: operations run one by one",
            "recorded": f"{steps} steps",
        }
        return Recording(
            f"training, {plan.tokens_per_step:,} tokens a step",
            facts,
            times,
            training_work(plan, compiled=compiled),
            plan.compute,
            measured_speeds("cpu"),
            plan.step_seconds,
            peak_memory_bytes(job.passes.device),
            trace,
        )


def _stepper(job: TrainingJob) -> Generator[None]:
    """One optimizer step at a time, as the trainer makes them, for ever."""
    with contextlib.closing(job.loader.steps(0)) as loaded:
        step = 0
        while True:
            with span("phase/step"):
                with span("phase/data"):
                    batches = next(loaded).batches
                result = train_step(
                    job.passes,
                    batches,
                    job.optimizer,
                    step=step,
                    seed=job.seed,
                    lr=learning_rate(step, job.schedule, job.lr, job.total_steps),
                    limits=NO_LIMITS,
                    replicas=job.replicas,
                )
                float(result.loss)
            step += 1
            yield


def _record_generation(config: Config) -> Recording:
    """Some tokens of the first batch of prompts, after a few to warm up."""
    section = config.generate
    if section.input is not None:
        prompts = read_prompts(Path(section.input))[: section.batch]
    elif section.prompt is not None:
        prompts = [section.prompt]
    else:
        raise ConfigError(
            "there is no prompt", where="generate", do="set generate.prompt or generate.input"
        )
    engine = runs.open_engine(config)
    tokens = config.profile.steps or _GENERATION_TOKENS
    passes: list[tuple[int, int, int]] = []
    _mark(engine.model, {"forward": "", "decode": "decode", "logits": ""})
    _mark_passes(engine.decoder, passes)
    warm = section.model_copy(update={"tokens": max(2, config.profile.warmup_steps)})
    wanted = section.model_copy(update={"tokens": tokens, "stop": []})
    with tempfile.TemporaryDirectory(prefix="penstock-profile-") as folder:
        engine.generate(prompts, warm, config.seed)
        passes.clear()
        with _recorder(Path(folder, "trace.json")) as finish, span("phase/step"):
            engine.generate(prompts, wanted, config.seed)
        times, trace = finish()
    model = engine.model
    compute = "bf16" if next(model.parameters()).element_size() == 2 else "fp32"
    a = model.architecture
    facts = {
        "model": _describe(a),
        "prompts": f"{len(prompts)}",
        "tokens": f"{len(passes)} passes",
        "compute": compute,
    }
    return Recording(
        f"generation, {len(prompts)} texts of up to {tokens} new tokens",
        facts,
        times,
        generation_work(a, compute, passes),
        compute,
        measured_speeds("cpu"),
        None,
        peak_memory_bytes(next(model.parameters()).device),
        trace,
    )


@contextlib.contextmanager
def _recorder(path: Path) -> Generator[Callable[[], tuple[Times, bytes]]]:
    """Record everything inside; what it gives then reads the recording."""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def finish() -> tuple[Times, bytes]:
        profiler.export_chrome_trace(str(path))
        trace = path.read_bytes()
        return read_times(json.loads(trace)), trace

    with _silenced():
        profiler.__enter__()
    try:
        with recording(record_function):
            yield finish
    finally:
        with _silenced():
            profiler.__exit__(None, None, None)


@contextlib.contextmanager
def _silenced() -> Generator[None]:
    """Without standard error: torch's profiler announces itself there, past every setting."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _describe(a: Architecture) -> str:
    return f"{a.layers} layers × {a.hidden_size} wide, {a.parameter_count():,} parameters"


def _mark(model: Transformer, methods: Mapping[str, str]) -> None:
    """Name the stretches in which modules work: method → what its stretches are called."""
    parts: list[tuple[nn.Module, str]] = [(model.embed, "embedding"), (model.head, "head")]
    parts += [(block, "block") for block in model.blocks]
    for module, part in parts:
        for method, kind in methods.items():
            work = getattr(module, method, None)
            if work is not None:
                setattr(module, method, _named(work, f"region/{part} {kind}".strip()))


def _mark_passes(decoder: Any, passes: list[tuple[int, int, int]]) -> None:  # noqa: ANN401 - any decoder
    """Note the shape of every pass: rows, new positions, cached positions."""
    extend, begin, start = decoder.extend, decoder.begin, 0

    def begin_again(*given: Any) -> Any:  # noqa: ANN401 - as the method
        nonlocal start
        start = 0
        return begin(*given)

    def extend_noting(tokens: Any) -> Any:  # noqa: ANN401 - as the method
        nonlocal start
        rows, count = tokens.shape
        passes.append((rows, count, start))
        start += count
        return extend(tokens)

    decoder.begin, decoder.extend = begin_again, extend_noting


def _named(work: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same, inside a span; what many tokens go through at once is a prefill."""

    def named(*given: Any, **more: Any) -> Any:  # noqa: ANN401 - as the method
        is_prefill = name.endswith("decode") and given[0].shape[1] > 1
        with span(name.replace("decode", "prefill") if is_prefill else name):
            return work(*given, **more)

    return named
