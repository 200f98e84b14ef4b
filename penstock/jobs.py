"""How a config and a plan become the things a verb works with: models, kernels, runs.

`api.py` and `train_run.py` call it. Like them and `planning.py`, and no other module, it sees the
whole `Config`.
"""

from pathlib import Path

import torch
from torch import Tensor

from penstock.compiler.build import build_kernels
from penstock.compiler.executable import Executable, load_built, write_executable
from penstock.compiler.plan import Plan
from penstock.compiler.runtime import CompiledKernel, attach
from penstock.compiler.toolchains import find_toolchain, toolchain_for
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.errors import ConfigError, ExecutableError
from penstock.models.hub import model_folder
from penstock.models.huggingface import load_model
from penstock.models.initialization import initialize
from penstock.models.transformer import Transformer
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
    if config.model.from_ is not None:
        folder = model_folder(config.model.from_)
        model = load_model(folder, plan.architecture, "cpu", torch.float32)
    else:
        model = Transformer(plan.architecture)
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
