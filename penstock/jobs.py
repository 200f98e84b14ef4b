"""How a config becomes the things a verb works with: plans, models, kernels, runs.

`api.py` is the only caller, and with it the only module that sees the whole `Config`.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from penstock.compiler.executable import Executable, load_built, write_executable
from penstock.compiler.plan import Plan, make_generation_plan, make_plan
from penstock.compiler.probe import detected_target
from penstock.compiler.runtime import CompiledKernel, attach
from penstock.compiler.toolchain import build_kernels, has_compiler
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.data.dataset import Dataset
from penstock.errors import CheckpointError, ConfigError, DoesNotFitError, ExecutableError
from penstock.hardware.detect import gpus
from penstock.hardware.target import Target, load_target
from penstock.models.hub import model_folder
from penstock.models.huggingface import load_weights
from penstock.models.initialization import initialize
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer
from penstock.training.run_folder import RunFolder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of weights by the plan's compute format."""


def device_of(config: Config) -> str:
    """Cpu or cuda; a clear refusal where CUDA was asked for and is not there."""
    if config.device == "cpu" or (config.device == "auto" and not gpus()):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if config.device == "cuda":
        raise ConfigError(
            "this torch finds no CUDA device", where="device", do="use device=cpu, or install CUDA"
        )
    return "cpu"


def target_of(config: Config) -> Target:
    """The machine to plan for."""
    if config.plan.target == "detect":
        return detected_target(device_of(config))
    return load_target(config.plan.target)


def open_dataset(config: Config) -> Dataset:
    """The dataset `data.path` names."""
    if config.data.path is None:
        raise ConfigError("no dataset", where="data.path", do="set data.path=FOLDER")
    return Dataset.open(config.data.path, config.data.verify)


def plan_of(config: Config, dataset: Dataset | None, mode: str = "train") -> Plan:
    """Decide the step for what the config describes; the vocabulary is the dataset's, and for
    evaluating or generating the whole model is the run's, where they are named.
    """
    run = None if mode == "train" or config.run is None else plan_of_run(run_folder(config))
    vocab_size = None if dataset is None else dataset.vocab_size
    if run is None:
        architecture = resolve_architecture(config.model, vocab_size)
    else:
        architecture = run.architecture
    length = config.data.sequence_length
    if length is None and dataset is not None:
        length = dataset.manifest.get("sequence_length")
    length = length or architecture.max_positions
    compute = config.precision.compute or (None if run is None else run.compute)
    target = target_of(config)
    if mode == "generate":
        return make_generation_plan(
            architecture,
            batch=config.generate.batch,
            compute=compute,
            capacity=length,
            target=target,
        )
    plan = make_plan(
        architecture,
        batch=config.batch,
        plan=config.plan,
        compute=compute,
        sequence_length=length,
        target=target,
    )
    return dataclasses.replace(plan, mode=mode)


def require_fit(plan: Plan) -> None:
    """Refuse a plan that needs more memory than there is."""
    if not plan.fits:
        needed, limit = (size / 2**30 for size in (plan.memory["total"], plan.memory_limit_bytes))
        raise DoesNotFitError(
            f"one step needs {needed:.1f} GiB, {plan.target} has {limit:.1f} GiB",
            where="plan",
            do=" ".join(plan.advice),
        )


def follow_executable(config: Config, plan: Plan) -> Config:
    """Fill in what the user left open with what an executable was compiled for."""
    model = config.model.model_dump(exclude_unset=True)
    if not {"preset", "from_", "from"} & model.keys():
        shape = dataclasses.asdict(plan.architecture)
        known = set(type(config.model).model_fields) - {"preset", "from_"}
        model = {**{k: v for k, v in shape.items() if k in known}, **model}
    given = {
        "model": model,
        "batch": {"micro": plan.micro, **config.batch.model_dump(exclude_unset=True)},
        "data": {
            "sequence_length": plan.sequence_length,
            **config.data.model_dump(exclude_unset=True),
        },
        "precision": {"compute": plan.compute, **config.precision.model_dump(exclude_unset=True)},
        "plan": {"loss_chunks": plan.loss_chunks, **config.plan.model_dump(exclude_unset=True)},
    }
    sections = {name: type(getattr(config, name)).model_validate(v) for name, v in given.items()}
    return config.model_copy(update=sections)


def compiled_kernels(
    config: Config, plan: Plan, save_to: Path | None
) -> dict[str, CompiledKernel] | None:
    """Kernels for `plan`, compiled now or taken from the cache; None, saying why, to run eagerly.

    `save_to` gets the executable, so that the next start needs no cache.
    """
    console = get_console()
    if plan.device != "cpu":
        console.warning("region kernels are compiled for CPUs only so far: running eagerly")
        return None
    if config.compile.mode == "off":
        console.info("compile.mode=off: running eagerly")
        return None
    if not has_compiler():
        console.warning("no C++ compiler was found: running eagerly")
        return None
    cache = Path(config.compile.cache) if config.compile.cache else None
    with console.stage("compiling (once; kernels are cached by content)"):
        built = build_kernels(plan, workers=config.compile.workers, cache=cache)
    if save_to is not None:
        write_executable(save_to, plan, built)
    return load_built(built)


def training_kernels(
    config: Config, plan: Plan, executable: Executable | None, run: RunFolder
) -> dict[str, CompiledKernel] | None:
    """From the executable the user named, the one in the run folder, or the compiler."""
    if executable is not None:
        executable.require(plan)
        return executable.kernels()
    return kept_kernels(run, plan, config) or compiled_kernels(config, plan, run.executable)


def kept_kernels(run: RunFolder, plan: Plan, config: Config) -> dict[str, CompiledKernel] | None:
    """The run's own executable, where it exists and fits this machine and plan."""
    if not run.executable.is_file() or config.compile.mode == "off":
        return None
    try:
        executable = Executable.open(run.executable, config.trust)
        executable.require(plan)
    except ExecutableError as error:
        get_console().info(f"not using the run's executable: {error.what}")
        return None
    return executable.kernels()


def new_model(
    config: Config, plan: Plan, kernels: dict[str, CompiledKernel] | None
) -> tuple[Transformer, dict[str, Tensor]]:
    """A model in the compute format with its kernels, and its weights in float32 by name."""
    model = Transformer(plan.architecture)
    if config.model.from_ is not None:
        load_weights(model_folder(config.model.from_), model)
    else:
        initialize(model, config.seed)
    masters: dict[str, Tensor] = {}
    if plan.compute != "fp32":
        masters = {name: value.detach() for name, value in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(plan.device, DTYPES[plan.compute])
    else:
        model.to(plan.device)
    if kernels is not None:
        attach(model, kernels, recompute=plan.recompute == "blocks")
    return model, masters


def run_folder(config: Config) -> RunFolder:
    """The run folder `run` names; it need not exist."""
    if config.run is None:
        raise ConfigError("no run folder", where="run", do="set run=FOLDER")
    return RunFolder(config.run)


def plan_of_run(folder: RunFolder) -> Plan:
    """What a run was trained by."""
    folder.require()
    try:
        return Plan.from_json(json.loads(folder.plan.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{folder.plan} is missing or damaged", where="run", do="restore it from a copy"
        ) from None
