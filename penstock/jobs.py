"""How a config and a plan become the things a verb works with: models, kernels, runs.

`api.py` and `train_run.py` call it. Like them and `planning.py`, and no other module, it sees the
whole `Config`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.checkpoint import CheckpointState, load_newest
from penstock.compiler.executable import Executable, load_built, write_executable
from penstock.compiler.plan import Plan
from penstock.compiler.runtime import CompiledKernel, attach
from penstock.compiler.toolchain import build_kernels, has_compiler
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.data.dataset import Dataset
from penstock.data.tokenizer import Tokenizer
from penstock.errors import CheckpointError, ConfigError, ExecutableError
from penstock.inference.engine import Engine
from penstock.models.huggingface import load_weights
from penstock.models.initialization import initialize
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer
from penstock.planning import device_of
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
    return _kept_kernels(run, plan, config) or compiled_kernels(config, plan, run.executable)


def _kept_kernels(run: RunFolder, plan: Plan, config: Config) -> dict[str, CompiledKernel] | None:
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
        load_weights(Path(config.model.from_), model)
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


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to be used."""

    folder: RunFolder
    plan: Plan
    tokenizer: Tokenizer
    state: CheckpointState

    def weights(self) -> dict[str, Tensor]:
        """Float32 weights by parameter name."""
        return {
            name.removeprefix("master."): tensor
            for name, tensor in self.state.tensors.items()
            if name.startswith("master.")
        }

    def model(self, compute: str, device: str) -> Transformer:
        """The trained model, in the given format."""
        model = Transformer(self.plan.architecture)
        weights = self.weights()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return model.to(device, DTYPES[compute]).requires_grad_(False)


def run_folder(config: Config) -> RunFolder:
    """The run folder `run` names; it need not exist."""
    if config.run is None:
        raise ConfigError("no run folder", where="run", do="set run=FOLDER")
    return RunFolder(config.run)


def load_run(config: Config) -> LoadedRun:
    """Open a run folder at its newest whole checkpoint.

    Raises:
        CheckpointError: not a run, or damaged.
    """
    folder = run_folder(config)
    folder.require()
    try:
        plan = Plan.from_json(json.loads(folder.plan.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{folder.plan} is missing or damaged", where="run", do="restore it from a copy"
        ) from None
    state = load_newest(folder.checkpoints, weights_only=True)
    if state is None:
        raise CheckpointError(f"{folder.path} has no checkpoint", where="run", do="train first")
    return LoadedRun(folder, plan, Tokenizer.load(folder.tokenizer), state)


def require_same_tokenizer(expected: str, dataset: Dataset, where: str) -> None:
    """Refuse data made with another tokenizer than the weights were trained with."""
    if dataset.tokenizer_sha256 != expected:
        raise CheckpointError(
            f"{dataset.path} was made with another tokenizer than {where}",
            where="data.path",
            do="prepare the data with tokenizer.from=RUN, or choose the right dataset",
        )


def require_same_job(identity: dict[str, Any], state: CheckpointState) -> None:
    """Refuse to resume a checkpoint of another architecture or tokenizer."""
    before = state.values.get("identity", {})
    for name, value in json.loads(json.dumps(identity)).items():
        if before.get(name) != value:
            raise CheckpointError(
                f"the checkpoint has {name}={before.get(name)}, this job {name}={value}",
                where="run",
                do="give the same settings as before, or another run folder",
            )


def attach_for_evaluation(config: Config, loaded: LoadedRun, model: Transformer) -> int:
    """Give a loaded model kernels where there are any; returns the rows it takes at a time."""
    plan = loaded.plan
    if plan.device != "cpu" or (config.precision.compute or plan.compute) != plan.compute:
        return config.evaluate.batch
    if config.executable is not None:
        executable = Executable.open(config.executable, config.trust)
        executable.require(plan)
        kernels = executable.kernels()
    else:
        kernels = _kept_kernels(loaded.folder, plan, config)
    if kernels is None:
        return config.evaluate.batch
    attach(model, kernels, recompute=False)
    return plan.micro


def open_engine(config: Config) -> Engine:
    """A generator over a run, or over a model in the Hugging Face layout.

    Weights are float32 unless `precision.compute` asks for bf16: text then does not depend on
    what else is in the batch.
    """
    device, compute = device_of(config), config.precision.compute or "fp32"
    if config.model.from_ is None:
        loaded = load_run(config)
        return Engine(loaded.model(compute, device), loaded.tokenizer)
    folder = Path(config.model.from_)
    model = Transformer(resolve_architecture(config.model))
    load_weights(folder, model)
    tokenizer = Tokenizer.load(config.tokenizer.from_ or folder)
    return Engine(model.to(device, DTYPES[compute]).requires_grad_(False), tokenizer)
