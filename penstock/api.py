"""The public functions, one per verb; each takes a config and returns a result.

Every function accepts a `Config`, a mapping, a YAML file, or keyword sections, such as
`penstock.train(data={"path": "DATASET"}, run="RUN", train={"steps": 100})`. Results have
`.json()` for machines and `.show(console)` for people.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock import jobs
from penstock.checkpoint import AsyncSaver
from penstock.compiler.executable import Executable, write_executable
from penstock.compiler.plan import Plan
from penstock.compiler.probe import measured_speeds
from penstock.compiler.toolchain import build_kernels
from penstock.config.load import as_config, dump_config
from penstock.config.schema import Config
from penstock.console import Console, get_console
from penstock.data.dataset import MANIFEST, Dataset
from penstock.data.loader import Loader
from penstock.data.prepare import PrepareResult
from penstock.data.prepare import prepare as prepare_dataset
from penstock.errors import ConfigError
from penstock.evaluation.compression import compressor_bits
from penstock.evaluation.perplexity import Scores, evaluate_split
from penstock.files import atomic_write, canonical_json, read_json
from penstock.inference.engine import Completion
from penstock.inference.prompts import converse, read_prompts, write_completions
from penstock.models.families import FAMILIES
from penstock.models.huggingface import save_weights
from penstock.report.doctor import DoctorReport, examine
from penstock.report.inspection import Inspection, inspect_executable, inspect_run
from penstock.report.page import ReportFiles, write_report
from penstock.report.summary import RunSummary, environment
from penstock.training.metrics import MetricsLog, peak_memory_bytes
from penstock.training.muon import Muon
from penstock.training.optimizer import AdamW
from penstock.training.run_folder import RunFolder
from penstock.training.schedule import check_schedule
from penstock.training.trainer import Trainer, TrainingJob

OPTIMIZERS = {"adamw": AdamW, "muon": Muon}
"""optimizer.name → class."""

ConfigLike = Config | Mapping[str, Any] | str | Path | None


def prepare(config: ConfigLike = None, **sections: Any) -> PrepareResult:  # noqa: ANN401 - sections of any kind
    """Make the dataset `data.path` from `source`."""
    c = as_config(config, **sections)
    return prepare_dataset(c.source, c.tokenizer, c.data, c.prepare)


def plan(config: ConfigLike = None, **sections: Any) -> Plan:  # noqa: ANN401 - sections of any kind
    """Decide how a training step maps to the machine, and predict memory, FLOPs and time."""
    c = as_config(config, **sections)
    result = jobs.plan_of(c, _dataset_if_there(c))
    if c.out is not None:
        path = Path(c.out) / "plan.json"
        atomic_write(path, json.dumps(result.to_json(), indent=1))
        get_console().path("plan", path)
    return result


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """An executable that was made, or found to be there already."""

    path: Path
    plan: Plan
    seconds: float
    reused: bool

    def json(self) -> dict[str, Any]:
        """Where it is and what it is for."""
        return {
            "executable": str(self.path),
            "bytes": self.path.stat().st_size,
            "seconds": round(self.seconds, 3),
            "reused": self.reused,
            "plan": self.plan.json(),
        }

    def show(self, console: Console) -> None:
        """One line."""
        state = "reused, unchanged" if self.reused else f"{self.seconds:.0f} s"
        console.path(f"executable ({state})", self.path)


def compile(config: ConfigLike = None, **sections: Any) -> CompileResult:  # noqa: ANN401 - the verb's name
    """Compile the plan's regions into the file `executable`."""
    started = time.monotonic()
    c = as_config(config, **sections)
    if c.executable is None:
        raise ConfigError("no file to write", where="executable", do="set executable=FILE.penstock")
    path = Path(c.executable)
    wanted = jobs.plan_of(c, _dataset_if_there(c))
    jobs.require_fit(wanted)
    if wanted.device != "cpu":
        raise ConfigError(
            "executables are made for CPUs only so far",
            where="device",
            do="use device=cpu; training on CUDA runs eagerly",
        )
    cache = Path(c.compile.cache) if c.compile.cache else None
    kernels = build_kernels(wanted, workers=c.compile.workers, cache=cache)
    reused = all(kernel.reused for kernel in kernels.values())
    write_executable(path, wanted, kernels)
    return CompileResult(path, wanted, time.monotonic() - started, reused)


def train(
    config: ConfigLike = None,
    *,
    origins: Mapping[str, str] | None = None,
    **sections: Any,  # noqa: ANN401 - sections of any kind
) -> RunSummary:
    """Train, or go on training, the run folder `run`."""
    c = as_config(config, **sections)
    run = _run_folder(c)
    executable = None
    if c.executable is not None:
        executable = Executable.open(c.executable, c.trust)
        c = jobs.follow_executable(c, executable.plan)
    dataset = jobs.open_dataset(c)
    chosen = jobs.plan_of(c, dataset)
    jobs.require_fit(chosen)
    loader = _loader(c, chosen, dataset)
    total_steps = _total_steps(c, loader)
    check_schedule(c.schedule, c.optimizer.lr, total_steps)
    with run.lock():
        resume = run.resume_state(c.checkpoint.resume)
        identity = {
            "architecture": dataclasses.asdict(chosen.architecture),
            "tokenizer": dataset.tokenizer_sha256,
        }
        if resume is not None:
            trained_with = str(resume.values["identity"]["tokenizer"])
            jobs.require_same_tokenizer(trained_with, dataset, f"the run {run.path}")
            jobs.require_same_job(identity, resume)
            finished = RunSummary.read(run.path)
            if resume.step >= total_steps and finished.values.get("complete"):
                get_console().info(f"{run.path} is trained to step {resume.step} already: reused")
                return finished
            get_console().info(f"resuming {run.path} after step {resume.step}")
        kernels = jobs.training_kernels(c, chosen, executable, run)
        _write_provenance(run, c, chosen, dataset, origins)
        model, masters = jobs.new_model(c, chosen, kernels)
        optimizer = OPTIMIZERS[c.optimizer.name](
            model.named_parameters(), c.optimizer, masters=masters
        )
        del masters
        job = TrainingJob(
            model=model,
            optimizer=optimizer,
            loader=loader,
            validation=_validation(c, chosen, dataset),
            train=c.train,
            schedule=c.schedule,
            checkpoint=c.checkpoint,
            lr=c.optimizer.lr,
            seed=c.seed,
            total_steps=total_steps,
            accumulation=chosen.accumulation,
            flops_per_token=chosen.flops_per_token,
            peak_flops=_peak_flops(chosen),
            saver=AsyncSaver(run.checkpoints, c.checkpoint.keep),
            metrics=MetricsLog(
                run.metrics,
                resume_step=0 if resume is None else resume.step,
                tensorboard=run.tensorboard if c.train.tensorboard else None,
            ),
            identity=identity,
        )
        trainer = Trainer(job, resume)
        totals = trainer.run()
        job.metrics.close()
        before = read_json(run.summary) if run.summary.is_file() else {}
        summary = RunSummary(
            run.path,
            {
                **{name: before[name] for name in ("evaluation", "compressors") if name in before},
                "complete": totals.step >= total_steps or totals.reached_target,
                "steps": totals.step,
                "tokens": totals.tokens,
                "seconds": round(totals.seconds, 3),
                "loss": {"final": totals.last_loss, "best_validation": totals.best_loss},
                "throughput": {
                    "tokens_per_second": trainer.throughput.mean_tokens_per_second,
                    "mfu": trainer.throughput.mfu,
                    "peak_flops": job.peak_flops,
                },
                "skipped_steps": trainer.guard.skipped,
                "memory_bytes": peak_memory_bytes(trainer.device),
                "predicted_memory_bytes": chosen.memory["total"],
                "parameters": chosen.architecture.parameter_count(),
                "compiled": kernels is not None,
                "plan": chosen.json(),
                "config_hash": _config_hash(c),
                **environment(),
            },
        )
        summary.write()
        if c.train.report:
            summary.report = write_report(run.path)
    return summary


def _dataset_if_there(config: Config) -> Dataset | None:
    """The dataset, for its vocabulary, where one is named."""
    return None if config.data.path is None else jobs.open_dataset(config)


def _run_folder(config: Config) -> RunFolder:
    if config.run is None:
        raise ConfigError("no run folder", where="run", do="set run=FOLDER")
    return RunFolder(config.run)


def _loader(config: Config, chosen: Plan, dataset: Dataset) -> Loader:
    return Loader(
        dataset.split(config.data.split),
        sequence_length=chosen.sequence_length,
        batch_size=chosen.size,
        micro=chosen.micro,
        seed=config.seed,
    )


def _validation(config: Config, chosen: Plan, dataset: Dataset) -> Loader | None:
    """A fixed sample of the validation split; None, saying so, where the split is empty."""
    split = dataset.split(config.data.validation_split)
    if split.samples(chosen.sequence_length) < 1:
        get_console().warning(f"split {split.name} is too small: no validation")
        return None
    return Loader(
        split,
        sequence_length=chosen.sequence_length,
        batch_size=chosen.micro,
        micro=chosen.micro,
        seed=0,
        limit=config.train.evaluate_sequences,
    )


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
        return max(1, math.ceil(t.epochs * loader.samples / loader.batch_size))
    return max(1, math.ceil((t.tokens or 1) / (loader.batch_size * loader.sequence_length)))


def _peak_flops(chosen: Plan) -> float:
    speeds = measured_speeds(chosen.device)
    return speeds.bf16_flops if chosen.compute == "bf16" else speeds.fp32_flops


def _config_hash(config: Config) -> str:
    return hashlib.sha256(canonical_json(config.model_dump(mode="json")).encode()).hexdigest()


def _write_provenance(
    run: RunFolder,
    config: Config,
    chosen: Plan,
    dataset: Dataset,
    origins: Mapping[str, str] | None,
) -> None:
    """What the run is made of: resolved config, model config, plan, tokenizer."""
    family = FAMILIES[chosen.architecture.family]
    end = int(dataset.manifest["tokenizer"]["end_of_text"])
    hf_config = family.to_hf_config(chosen.architecture, end)
    atomic_write(run.config, dump_config(config, origins))
    atomic_write(run.path / "config.json", json.dumps(hf_config, indent=2))
    atomic_write(run.plan, json.dumps(chosen.to_json(), indent=1))
    atomic_write(run.tokenizer, (dataset.path / "tokenizer.json").read_bytes())


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores of a model on a split, and of compressors on the same text where asked for."""

    split: str
    scores: Scores
    compressors: dict[str, float]
    """Bits per byte of gzip, bzip2 and xz; empty unless asked for."""

    def json(self) -> dict[str, Any]:
        """All figures."""
        values = {"split": self.split, **self.scores.json()}
        return values if not self.compressors else {**values, "compressors": self.compressors}

    def show(self, console: Console) -> None:
        """Scores, and the compressors beside the model."""
        self.scores.show(console)
        if self.compressors:
            ours = {"this model": self.scores.bits_per_byte}
            named = {f"{name} -9": bits for name, bits in self.compressors.items()}
            rows = sorted({**ours, **named}.items(), key=lambda row: row[1])
            console.table(
                f"Bits per byte on the {self.split} split (lower is better)",
                ["", ""],
                [[name, f"{bits:.3f}"] for name, bits in rows],
            )


def evaluate(config: ConfigLike = None, **sections: Any) -> EvaluationResult:  # noqa: ANN401 - sections of any kind
    """Score a run, or a model in the Hugging Face layout, on held-out text."""
    c = as_config(config, **sections)
    dataset = jobs.open_dataset(c)
    split = dataset.split(c.evaluate.split)
    device = jobs.device_of(c)
    if c.model.from_ is not None:
        chosen = jobs.plan_of(c, dataset)
        model, _ = jobs.new_model(c, chosen, None)
        batch = c.evaluate.batch
    else:
        loaded = jobs.load_run(c.run)
        jobs.require_same_tokenizer(loaded.tokenizer.sha256, dataset, f"the run {c.run}")
        chosen = loaded.plan
        model = loaded.model(c.precision.compute or chosen.compute, device)
        batch = jobs.attach_for_evaluation(c, loaded, model)
    scores = evaluate_split(
        model,
        split,
        sequence_length=chosen.sequence_length,
        stride=c.evaluate.stride,
        batch=batch,
    )
    bits = compressor_bits(split, dataset.tokenizer()) if c.evaluate.compressors else {}
    result = EvaluationResult(split.name, scores, bits)
    if c.run is not None:
        summary = RunSummary.read(Path(c.run))
        summary.values["evaluation"] = {"split": split.name, **scores.json()}
        if bits:
            summary.values["compressors"] = bits
        summary.write()
        write_report(Path(c.run))
    return result


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """Completions, in the order of their prompts."""

    completions: list[Completion]
    streamed: bool
    """Whether the text has been shown already."""

    def json(self) -> Any:  # noqa: ANN401 - an object, or a list for several prompts
        """One object for one prompt, else a list."""
        values = [completion.json() for completion in self.completions]
        return values[0] if len(values) == 1 else values

    def show(self, console: Console) -> None:
        """Prompts and their continuations."""
        for completion in self.completions:
            if self.streamed:
                console.info(f"{completion.tokens} tokens in {completion.seconds:.2f} s")
            else:
                completion.show(console)


def generate(config: ConfigLike = None, **sections: Any) -> GenerationResult | None:  # noqa: ANN401 - sections of any kind
    """Continue `generate.prompt`, every prompt of `generate.input`, or what a person types."""
    c = as_config(config, **sections)
    section, console = c.generate, get_console()
    prompts = read_prompts(Path(section.input)) if section.input is not None else None
    engine = jobs.open_engine(c)
    if prompts is not None:
        completions = engine.generate(prompts, section, c.seed)
        if section.output is not None:
            write_completions(Path(section.output), completions)
            console.path("completions", section.output)
            return None
        return GenerationResult(completions, streamed=False)
    if section.prompt is not None:
        streamed = console.is_terminal and not console.json
        if streamed:
            console.write(section.prompt, end="")
        write = (lambda text: console.write(text, end="")) if streamed else None
        completions = engine.generate([section.prompt], section, c.seed, write)
        if streamed:
            console.write("")
        return GenerationResult(completions, streamed)
    if not console.is_terminal:
        raise ConfigError(
            "there is no prompt", where="generate", do="set generate.prompt or generate.input"
        )
    converse(console, lambda text, write: engine.generate([text], section, c.seed, write)[0])
    return None


@dataclasses.dataclass(frozen=True)
class ConversionResult:
    """A folder that was written."""

    folder: Path

    def json(self) -> dict[str, Any]:
        """Where it is."""
        return {"folder": str(self.folder), "files": sorted(p.name for p in self.folder.iterdir())}

    def show(self, console: Console) -> None:
        """One line."""
        console.path("folder for transformers", self.folder)


def convert(what: str, config: ConfigLike = None, **sections: Any) -> ConversionResult:  # noqa: ANN401 - sections of any kind
    """Write a run's weights as a folder `transformers` loads; `what` is "checkpoint"."""
    c = as_config(config, **sections)
    if what != "checkpoint":
        raise ConfigError(f"cannot convert {what}", where="convert", do="use convert checkpoint")
    if c.out is None:
        raise ConfigError("no folder to write", where="out", do="set out=FOLDER")
    loaded = jobs.load_run(c.run)
    save_weights(
        Path(c.out),
        loaded.weights(),
        loaded.plan.architecture,
        tokenizer=loaded.folder.tokenizer.read_text(encoding="utf-8"),
        end_of_text=loaded.tokenizer.end_of_text,
    )
    return ConversionResult(Path(c.out))


def inspect(path: str | Path, config: ConfigLike = None, **sections: Any) -> Inspection | Dataset:  # noqa: ANN401 - sections of any kind
    """What an executable, a dataset folder or a run folder holds. Runs nothing in it."""
    c = as_config(config, **sections)
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist", where="inspect", do="check the path")
    if path.is_file():
        return inspect_executable(Executable.inspect(path, c.trust))
    if (path / MANIFEST).is_file():
        return Dataset.open(path)
    return inspect_run(RunFolder(path))


def report(config: ConfigLike = None, **sections: Any) -> ReportFiles:  # noqa: ANN401 - sections of any kind
    """Write a run's loss curve and HTML report again."""
    c = as_config(config, **sections)
    return write_report(_run_folder(c).path)


def doctor(config: ConfigLike = None, **sections: Any) -> DoctorReport:  # noqa: ANN401 - sections of any kind
    """Examine this machine: processor, memory, compiler, OpenMP, allocator, measured speeds."""
    c = as_config(config, **sections)
    return examine(jobs.device_of(c))
