"""How a config and a plan become the things a verb works with: models, kernels, runs.

`api.py` and `train_run.py` call it. Like them and `planning.py`, and no other module, it sees the
whole `Config`.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.compiler.build import build_kernels
from penstock.compiler.eager_recompute import recompute_eagerly
from penstock.compiler.executable import Executable, write_executable
from penstock.compiler.kernels import CompiledKernel, load_built
from penstock.compiler.plan import Plan
from penstock.compiler.runtime import attach
from penstock.compiler.toolchains import find_toolchain, toolchain_for
from penstock.config.checksums import remembered_sha256
from penstock.config.lora import LoraSection
from penstock.config.schema import Config, ModelSection
from penstock.console import get_console
from penstock.errors import ConfigError, ExecutableError
from penstock.models.adapter import held_base
from penstock.models.architecture import Architecture
from penstock.models.frozen_base import hold
from penstock.models.hub import model_folder
from penstock.models.huggingface import load_model
from penstock.models.initialization import (
    every,
    held_parameters,
    initial_adapter,
    initialize,
    unfilled,
)
from penstock.models.parameters import frozen_names
from penstock.models.peft_format import read_adapter
from penstock.models.projection import is_trained
from penstock.models.split_block import own_tensors, split_blocks
from penstock.models.transformer import Transformer
from penstock.models.weight_files import weight_files
from penstock.training.run_folder import RunFolder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of weights by the plan's compute format."""


def compiled_kernels(
    config: Config, plan: Plan, save_to: Path | None
) -> dict[str, CompiledKernel] | None:
    """Kernels for `plan`, compiled now or taken from the cache; None, saying why, to run eagerly.

    `save_to` gets the executable, so that the next start needs no cache.
    """
    console = get_console()
    if plan.architecture.generic is not None:
        console.info(
            f"{plan.architecture.family} is not one of Penstock's families: it runs as "
            "transformers computes it, without kernels"
        )
        return None
    if plan.device != "cpu":
        console.warning("region kernels are compiled for CPUs only so far: running eagerly")
        return None
    if config.compile.mode == "off":
        console.info("compile.mode=off: running eagerly")
        return None
    section, toolchain = config.compile, toolchain_for(plan.mode, config.compile.toolchain)
    problem = find_toolchain(toolchain).problem()
    if problem is not None:
        console.warning(f"{problem}; running eagerly")
        return None
    cache = Path(section.cache) if section.cache else None
    with console.stage("compiling (once; kernels are cached by content)"):
        built = build_kernels(plan, toolchain=toolchain, workers=section.workers, cache=cache)
    if save_to is not None:
        write_executable(save_to, plan, built, toolchain)
    return load_built(built, toolchain)


def training_kernels(
    config: Config,
    plan: Plan,
    executable: Executable | None,
    run: RunFolder,
    save_to: Path | None,
) -> dict[str, CompiledKernel] | None:
    """From the executable the user named, the one in the run folder, or the compiler; `save_to`
    gets what was compiled.
    """
    if executable is not None:
        executable.require(plan)
        return executable.kernels()
    return kept_kernels(run, plan, config) or compiled_kernels(config, plan, save_to)


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
    config: Config,
    plan: Plan,
    kernels: dict[str, CompiledKernel] | None,
    *,
    part: int = 0,
    holds: Callable[[str], bool] = every,
) -> tuple[Transformer, dict[str, Tensor]]:
    """A model in the compute format with its kernels, and its weights in float32 by name; only
    what it `holds`, by name, has memory, and where the plan divides blocks, only this `part` of
    each.
    """
    has_adapters = plan.architecture.adapter is not None
    if has_adapters and config.train.freeze:
        raise ConfigError(
            "train.freeze and lora are both given: adapters freeze everything else",
            where="train.freeze",
            do="leave train.freeze out",
        )
    # Frozen weights have no masters: they come straight in the format they are used in.
    exact = DTYPES[plan.compute] if has_adapters else torch.float32
    model = base_model(config.model, plan.architecture, config.seed, exact, holds)
    masters: dict[str, Tensor] = {}
    if has_adapters:
        masters = start_adapters(model, config.lora, config.seed)
    else:
        named = dict(model.named_parameters())
        for name in frozen_names(named, config.train.freeze):
            named[name].requires_grad_(False)
    if plan.tensor > 1:
        split_blocks(model, part, plan.tensor)
        masters = own_tensors(plan.architecture, masters, part, plan.tensor)
    if plan.compute != "fp32":
        trained = ((n, p) for n, p in held_parameters(model) if p.requires_grad)
        masters = masters or {name: value.detach() for name, value in trained}
    _to_compute(model, plan)
    if kernels is not None:
        attach(model, kernels, recompute=plan.recompute, stages=plan.stages)
    elif config.plan.recompute is not None:
        recompute_eagerly(model, plan.recompute)
    return model, masters


def _to_compute(model: Transformer, plan: Plan) -> None:
    """Bring what the model holds to the plan's device, parameters in its format: `Module.to` would
    want what is held elsewhere too.
    """
    for _, parameter in held_parameters(model):
        parameter.data = parameter.data.to(plan.device, DTYPES[plan.compute])
    for buffer in model.buffers():
        buffer.data = buffer.data.to(plan.device)


def base_model(
    section: ModelSection,
    architecture: Architecture,
    seed: int,
    dtype: torch.dtype,
    holds: Callable[[str], bool] = every,
) -> Transformer:
    """A model with the weights training starts from, on the CPU, of those it `holds`; adapters are
    left as they come.
    """
    if section.from_ is not None:
        folder = model_folder(section.from_)
        if architecture.generic is not None:
            return _generic().load(folder, architecture, dtype)
        return load_model(folder, architecture, "cpu", dtype, holds)
    model = unfilled(architecture, "cpu", torch.float32, holds)
    initialize(model, seed)
    model.to(dtype)
    base = held_base(architecture.adapter)
    if base is not None:
        hold(model, base)
    return model


def empty_model(architecture: Architecture) -> Transformer:
    """A model whose weights are still to come."""
    return Transformer(architecture) if architecture.generic is None else _generic()(architecture)


def _generic() -> Any:  # noqa: ANN401 - the class has the methods of Transformer that training uses
    """The class of other models, which loads transformers: only where there is one."""
    from penstock.models.generic import GenericModel  # noqa: PLC0415

    return GenericModel


def base_identity(config: Config) -> str:
    """Names the weights that adapters stand on: those of a folder, or drawn from a seed."""
    if config.model.from_ is None:
        return f"seed {config.seed}"
    files = weight_files(model_folder(config.model.from_))
    digests = [remembered_sha256(file) for file in files]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


@torch.no_grad()
def start_adapters(model: Transformer, section: LoraSection, seed: int) -> dict[str, Tensor]:
    """Fill a model's adapters and freeze all else; their float32 values by name."""
    read: dict[str, Tensor] = {}
    if section.from_ is not None:
        read = read_adapter(Path(section.from_), model.architecture)
    adapters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(model.architecture, name))
        if parameter.requires_grad and not parameter.is_meta:
            adapters[name] = read.get(name, initial_adapter(name, parameter.shape, seed))
            parameter.copy_(adapters[name])
    return adapters


def run_folder(config: Config) -> RunFolder:
    """The run folder `run` names; it need not exist."""
    if config.run is None:
        raise ConfigError("no run folder", where="run", do="set run=FOLDER")
    return RunFolder(config.run)
