"""Run a job for a few steps under torch's profiler, and read off where its time went.

`profiling/verb.py` calls it. The job is what `train` or `generate` would run: same model, kernels,
data and optimizer step; nothing of it is kept but the recording.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path

from penstock import runs
from penstock.compiler.plan import Plan
from penstock.compiler.probe import Speeds, measured_speeds
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.errors import ConfigError
from penstock.inference.prompts import read_prompts
from penstock.models.architecture import Architecture
from penstock.models.transformer import Transformer
from penstock.parallel.environment import Place
from penstock.parallel.replicas import local
from penstock.parallel.stage import Stage
from penstock.parallel.world import World
from penstock.profiling.marks import mark_modules, mark_passes
from penstock.profiling.processes import ProcessRecording
from penstock.profiling.recorder import recorded
from penstock.profiling.trace import Times
from penstock.profiling.work import Held, Work, generation_work, training_work
from penstock.spans import span
from penstock.train_run import prepare_job
from penstock.training.guard import NO_LIMITS
from penstock.training.metrics import peak_memory_bytes
from penstock.training.schedule import learning_rate
from penstock.training.step import train_step
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
    device: str
    speeds: Speeds
    """Of the part of the machine that one process has."""
    predicted_seconds: float | None
    """The plan's, of one step."""
    peak_memory_bytes: int
    trace: bytes
    """Chrome's trace event format, as JSON."""
    processes: list[ProcessRecording] = dataclasses.field(default_factory=list[ProcessRecording])
    """All of them by rank, where there are several; `times` and `work` are the first's."""


def record(config: Config) -> Recording:
    """Record the job of a config in this process, training or generation as `mode` says.

    Raises:
        UserError: what `train` and `generate` refuse; a mode that is not profiled.
    """
    if config.mode == "train":
        with tempfile.TemporaryDirectory(prefix="penstock-profile-") as folder:
            return record_training(config, World(Place()), Path(folder))[0]
    if config.mode == "generate":
        return _record_generation(config)
    raise ConfigError(
        f"profile does not record mode={config.mode}", where="mode", do="use train or generate"
    )


def record_training(config: Config, world: World, folder: Path) -> tuple[Recording, Plan]:
    """Some optimizer steps from fresh weights, after some to warm up; `folder` is given up."""
    section, steps = config.profile, config.profile.steps or _TRAINING_STEPS
    plan, job, compiled = prepare_job(_shortened(config, steps, folder), world)
    models = job.passes.models
    for model in models:
        mark_modules(model, {"forward": "forward"})
    get_console().info(f"recording {steps} steps after {section.warmup_steps} to warm up")
    with (
        contextlib.closing(job.saver) if job.saver else contextlib.nullcontext(),
        job.metrics or contextlib.nullcontext(),
        contextlib.closing(_stepper(job)) as run_steps,
    ):
        for _ in range(section.warmup_steps):
            next(run_steps)
        with recorded(folder / "trace.json", plan.device) as finish:
            world.end_step(False)  # All begin together.
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
    found = Recording(
        title=f"training, {plan.tokens_per_step:,} tokens a step",
        facts=facts,
        times=times,
        work=training_work(plan, compiled=compiled, held=_held(models, world.size)),
        compute=plan.compute,
        device=plan.device,
        speeds=measured_speeds(plan.device),
        predicted_seconds=plan.step_seconds,
        peak_memory_bytes=peak_memory_bytes(job.passes.device),
        trace=trace,
    )
    return found, plan


def _shortened(config: Config, steps: int, folder: Path) -> Config:
    """The same job over the steps of a recording, with a run folder that nobody keeps."""
    total = {"steps": config.profile.warmup_steps + steps, "epochs": None, "tokens": None}
    train = config.train.model_copy(update={**total, "tensorboard": False})
    schedule = config.schedule.model_copy(update={"warmup": 0, "decay": None})
    update = {"run": str(folder / "run"), "train": train, "schedule": schedule}
    return config.model_copy(update=update)


def _held(models: Sequence[Transformer], processes: int) -> Held | None:
    """What this process has of the model, where others have some of it too."""
    if processes == 1:
        return None
    blocks = [block for model in models for block in model.blocks]
    trained = {id(p): p for model in models for p in model.parameters() if p.requires_grad}
    ends = [(m.index == 0, m.is_last) if isinstance(m, Stage) else (True, True) for m in models]
    return Held(
        layers=sum(any(True for _ in block.parameters()) for block in blocks),
        has_embedding=any(first for first, _ in ends),
        has_head=any(last for _, last in ends),
        parameters=sum(local(p).numel() for p in trained.values()),
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
                job.world.end_step(False)
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
    device = next(engine.model.parameters()).device
    tokens = config.profile.steps or _GENERATION_TOKENS
    passes: list[tuple[int, int, int]] = []
    mark_modules(engine.model, {"forward": "", "decode": "decode", "logits": ""})
    mark_passes(engine.decoder, passes)
    warm = section.model_copy(update={"tokens": max(2, config.profile.warmup_steps)})
    wanted = section.model_copy(update={"tokens": tokens, "stop": []})
    with tempfile.TemporaryDirectory(prefix="penstock-profile-") as folder:
        engine.generate(prompts, warm, config.seed)
        passes.clear()
        with recorded(Path(folder, "trace.json"), device.type) as finish, span("phase/step"):
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
        title=f"generation, {len(prompts)} texts of up to {tokens} new tokens",
        facts=facts,
        times=times,
        work=generation_work(a, compute, passes),
        compute=compute,
        device=device.type,
        speeds=measured_speeds(device.type),
        predicted_seconds=None,
        peak_memory_bytes=peak_memory_bytes(device),
        trace=trace,
    )


def _describe(a: Architecture) -> str:
    return f"{a.layers} layers × {a.hidden_size} wide, {a.parameter_count():,} parameters"
