"""The public functions, one per verb; each takes a config and returns a result.

Every function accepts a `Config`, a mapping, a YAML file, or keyword sections, such as
`penstock.train(data={"path": "DATASET"}, run="RUN", train={"steps": 100})`. Results have
`.json()` for machines and `.show(console)` for people.

A verb imports what it needs when it is called: torch takes two seconds to load, which is most of
what `plan`, and a mistake in a config, would cost.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock import planning
from penstock.config.load import as_config
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.errors import CheckpointError, ConfigError
from penstock.hardware.process import quiet_profiler

if TYPE_CHECKING:
    from penstock.bench.report import BenchResult
    from penstock.compiler.plan import Plan
    from penstock.data.convert import DatasetConversion
    from penstock.data.prepare import PrepareResult
    from penstock.migrate.translate import ImportedConfig
    from penstock.profiling.report import ProfileResult
    from penstock.report.doctor import DoctorReport
    from penstock.report.inspection import Inspection
    from penstock.report.inspection_data import DataInspection
    from penstock.report.page import ReportFiles
    from penstock.report.summary import RunSummary
    from penstock.results import (
        ComparisonResult,
        CompileResult,
        ConversionResult,
        EvaluationResult,
        GenerationResult,
    )

ConfigLike = Config | Mapping[str, Any] | str | Path | None


def prepare(config: ConfigLike = None, **sections: Any) -> "PrepareResult":  # noqa: ANN401 - sections of any kind
    """Make the dataset `data.path` from `source`."""
    from penstock.data.prepare import prepare as prepare_dataset

    c = as_config(config, **sections)
    return prepare_dataset(c.source, c.tokenizer, c.data, c.prepare, c.seed, c.clean, c.ray)


def plan(config: ConfigLike = None, **sections: Any) -> "Plan":  # noqa: ANN401 - sections of any kind
    """Decide how a training step maps to the machine, and predict memory, FLOPs and time.

    With `out`, also write plan.json, its pictures and a page there.
    """
    c = as_config(config, **sections)
    data = planning.named_training_data(c)
    result = planning.plan_of(c, data, c.mode)
    if data is not None:
        data.announce(c.data.split, result.sequence_length)
    if c.out is not None:
        from penstock.report.plan_page import write_plan

        files = write_plan(result, Path(c.out))
        get_console().path("plan", files.plan)
        get_console().path("pictures", files.page)
    return result


def compile(config: ConfigLike = None, **sections: Any) -> "CompileResult":  # noqa: ANN401 - the verb's name
    """Compile the plan's regions into the file `executable`."""
    from penstock.compiler.build import build_kernels, trace_graphs
    from penstock.compiler.executable import write_executable
    from penstock.compiler.toolchains import PORTABLE, toolchain_for
    from penstock.results import CompileResult

    started = time.monotonic()
    c = as_config(config, **sections)
    if c.executable is None:
        raise ConfigError("no file to write", where="executable", do="set executable=FILE.penstock")
    path = Path(c.executable)
    wanted = planning.plan_of(c, planning.named_training_data(c), c.mode)
    planning.require_fit(wanted)
    if wanted.architecture.generic is not None:
        raise ConfigError(
            f"{wanted.architecture.family} is not one of Penstock's families: it has no kernels",
            where="model.from",
            do="train without compiling: it runs as transformers computes it",
        )
    if wanted.device != "cpu":
        write_executable(path, wanted, trace_graphs(wanted), PORTABLE)
        get_console().warning(
            f"no toolchain here makes machine code for {wanted.target}: the file holds the "
            "portable graphs of its regions only"
        )
        return CompileResult(path, wanted, time.monotonic() - started, False, PORTABLE)
    section = c.compile
    cache = Path(section.cache) if section.cache else None
    toolchain = toolchain_for(wanted.mode, section.toolchain)
    kernels = build_kernels(wanted, toolchain=toolchain, workers=section.workers, cache=cache)
    reused = all(kernel.reused for kernel in kernels.values())
    write_executable(path, wanted, kernels, toolchain)
    return CompileResult(path, wanted, time.monotonic() - started, reused, toolchain)


def train(
    config: ConfigLike = None,
    *,
    origins: Mapping[str, str] | None = None,
    **sections: Any,  # noqa: ANN401 - sections of any kind
) -> "RunSummary":
    """Train, or go on training, the run folder `run`.

    `origins`: where each setting came from, by dotted key, for the run's config.yaml.
    """
    from penstock.train_run import train_run

    return train_run(as_config(config, **sections), origins or {})


def evaluate(
    config: ConfigLike = None,
    **sections: Any,  # noqa: ANN401 - sections of any kind
) -> "EvaluationResult | ComparisonResult":
    """Score a run, or a model in the Hugging Face layout, on `evaluate.tasks`: held-out text by
    default. With `evaluate.compare`, others beside it.
    """
    from penstock.evaluate_run import evaluate_run

    return evaluate_run(as_config(config, **sections))


def generate(config: ConfigLike = None, **sections: Any) -> "GenerationResult | None":  # noqa: ANN401 - sections of any kind
    """Continue `generate.prompt`, every prompt of `generate.input`, or what a person types."""
    from penstock import runs
    from penstock.inference.prompts import converse, read_prompts, write_completions
    from penstock.results import GenerationResult

    c = as_config(config, **sections)
    section, console = c.generate, get_console()
    prompts = read_prompts(Path(section.input)) if section.input is not None else None
    engine = runs.open_engine(c)
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


def convert(
    what: str,
    config: ConfigLike = None,
    **sections: Any,  # noqa: ANN401 - sections of any kind
) -> "ConversionResult | DatasetConversion":
    """Write a run's weights for `transformers`, its adapters for `peft`, or a dataset in another
    format.

    `what` is "checkpoint", "adapter" or "dataset".
    """
    from penstock import exports, runs
    from penstock.data.convert import convert_dataset
    from penstock.results import ConversionResult

    c = as_config(config, **sections)
    if what not in ("checkpoint", "adapter", "dataset"):
        raise ConfigError(
            f"cannot convert {what}",
            where="convert",
            do="use convert checkpoint, convert adapter, or convert dataset",
        )
    if c.out is None:
        raise ConfigError("no folder to write", where="out", do="set out=FOLDER")
    if what == "dataset":
        if c.from_ is None:
            raise ConfigError("no dataset to read", where="from", do="set from=PATH")
        return convert_dataset(Path(c.from_), Path(c.out), c.data, c.tokenizer)
    loaded = runs.load_run(c)
    if what == "adapter":
        exports.write_adapter_of(loaded, Path(c.out))
        return ConversionResult(Path(c.out))
    exports.write_weights_of(loaded, Path(c.out))
    return ConversionResult(Path(c.out))


def import_config(
    path: str | Path,
    config: ConfigLike = None,
    **sections: Any,  # noqa: ANN401 - sections of any kind
) -> "ImportedConfig":
    """Another system's configuration in our keys; `from` names the system, `out` a file."""
    from penstock.migrate.systems import SYSTEMS
    from penstock.migrate.translate import translate

    c = as_config(config, **sections)
    if c.from_ is None:
        raise ConfigError(
            "the file's system is not named",
            where="--from",
            do=f"add --from with one of {', '.join(SYSTEMS)}",
        )
    return translate(Path(path), c.from_, Path(c.out) if c.out is not None else None)


def inspect(
    path: str | Path,
    config: ConfigLike = None,
    **sections: Any,  # noqa: ANN401 - sections of any kind
) -> "Inspection | DataInspection":
    """What an executable, a dataset in any format, or a run holds. Runs nothing in it.

    With `out`, also write a page about a dataset there.
    """
    from penstock.compiler.executable import Executable
    from penstock.data.dataset import MANIFEST
    from penstock.data.formats.recognize import may_be_data
    from penstock.report.inspection import inspect_executable, inspect_run
    from penstock.report.inspection_data import inspect_data
    from penstock.report.inspection_page import write_inspection
    from penstock.training.run_folder import RunFolder

    c = as_config(config, **sections)
    path = Path(path)
    if path.is_file() and not may_be_data(path):
        return inspect_executable(Executable.inspect(path, c.trust))
    if RunFolder(path).config.is_file() and not (path / MANIFEST).is_file():
        return inspect_run(RunFolder(path))
    found = inspect_data(path, c.tokenizer)
    return found if c.out is None else write_inspection(found, Path(c.out))


def report(config: ConfigLike = None, **sections: Any) -> "ReportFiles":  # noqa: ANN401 - sections of any kind
    """Write a run's loss curve and HTML report again."""
    from penstock import jobs
    from penstock.report.page import write_report

    c = as_config(config, **sections)
    run = jobs.run_folder(c)
    if not run.metrics.is_file():
        raise CheckpointError(
            f"{run.path} is not a run: it has no {run.metrics.name}", where="run", do="train first"
        )
    return write_report(run.path)


def doctor(config: ConfigLike = None, **sections: Any) -> "DoctorReport":  # noqa: ANN401 - sections of any kind
    """Examine this machine: processor, memory, compiler, OpenMP, allocator, measured speeds."""
    from penstock.report.doctor import examine

    c = as_config(config, **sections)
    return examine(planning.device_of(c))


def bench(
    spec: str | Path,
    config: ConfigLike = None,
    *,
    benchmarks: Sequence[str] = (),
    compare: str | Path | None = None,
    **sections: Any,  # noqa: ANN401 - sections of any kind
) -> "BenchResult":
    """Run the benchmarks of a file, all or those named, into `out`; see `bench/verb.py`."""
    from penstock.bench.verb import run_file

    return run_file(Path(spec), as_config(config, **sections).out, benchmarks, compare)


def profile(config: ConfigLike = None, **sections: Any) -> "ProfileResult | None":  # noqa: ANN401 - sections of any kind
    """Record some steps of training or generation, as `mode` says, and report them in `out`; None
    in a process of several that another reports for.
    """
    c = as_config(config, **sections)
    quiet_profiler()
    from penstock.profiling.verb import profile_run

    return profile_run(c)
