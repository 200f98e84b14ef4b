"""From a config to a trained run or model, ready to evaluate and to generate.

`api.py` and `train_run.py` open what is there through here; `jobs.py` makes what is new.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.checkpoint import (
    CheckpointState,
    best_checkpoint,
    load_checkpoint,
    load_newest,
)
from penstock.compiler.executable import Executable
from penstock.compiler.native import STEP_KERNEL
from penstock.compiler.plan import Plan
from penstock.compiler.runtime import attach
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.data.dataset import Dataset
from penstock.data.tokenizer import Tokenizer
from penstock.errors import CheckpointError
from penstock.inference.decoding import CompiledDecoder
from penstock.inference.engine import Engine
from penstock.inference.native import NativeDecoder
from penstock.jobs import DTYPES, kept_kernels, run_folder
from penstock.models.hub import model_folder
from penstock.models.huggingface import load_model
from penstock.models.quantization import round_weights
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer
from penstock.planning import device_of
from penstock.training.run_folder import RunFolder


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


def _chosen_state(folder: RunFolder, use: str) -> CheckpointState:
    """The newest whole checkpoint, or the best by validation loss."""
    if use == "best":
        best = best_checkpoint(folder.checkpoints)
        if best is None:
            raise CheckpointError(
                f"{folder.path} has no best checkpoint: it was never validated",
                where="checkpoint.use",
                do="use checkpoint.use=newest, or train with train.evaluate_every",
            )
        return load_checkpoint(best, weights_only=True)
    state = load_newest(folder.checkpoints, weights_only=True)
    if state is None:
        raise CheckpointError(f"{folder.path} has no checkpoint", where="run", do="train first")
    return state


def load_run(config: Config) -> LoadedRun:
    """Open a run folder at the checkpoint `checkpoint.use` names.

    Raises:
        CheckpointError: not a run, or damaged.
    """
    folder = run_folder(config)
    plan = folder.read_plan()
    state = _chosen_state(folder, config.checkpoint.use)
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
    executable = _executable_for(config, "evaluate", ("train", "evaluate"))
    if executable is not None:
        executable.require(dataclasses.replace(plan, mode=executable.plan.mode))
        kernels = executable.kernels()
    else:
        kernels = kept_kernels(loaded.folder, plan, config)
    if kernels is None:
        return config.evaluate.batch
    attach(model, kernels, recompute=False)
    return plan.micro


def _executable_for(config: Config, verb: str, modes: Sequence[str]) -> Executable | None:
    """The executable a config names; one made for something else is left aside, and it says so,
    since one config may serve several verbs.
    """
    if config.executable is None:
        return None
    executable = Executable.open(config.executable, config.trust)
    if executable.plan.mode in modes:
        return executable
    get_console().info(
        f"{executable.path} is for mode={executable.plan.mode}: {verb} goes on without it"
    )
    return None


def open_engine(config: Config) -> Engine:
    """A generator over a run, or over a model in the Hugging Face layout.

    An executable decides the format of the weights. Without one it is float32 unless
    `precision.compute` asks for bf16: text then does not depend on what else is in the batch.
    """
    executable = _executable_for(config, "generate", ("generate",))
    default = "fp32" if executable is None else executable.plan.compute
    device, compute = device_of(config), config.precision.compute or default
    if config.model.from_ is None:
        loaded = load_run(config)
        model, tokenizer = loaded.model(compute, device), loaded.tokenizer
    else:
        folder = model_folder(config.model.from_)
        architecture = resolve_architecture(config.model)
        model = load_model(folder, architecture, device, DTYPES[compute]).requires_grad_(False)
        tokenizer = Tokenizer.load(config.tokenizer.from_ or folder)
    if executable is None:
        if config.precision.weights == "int8":
            round_weights(model)
        return Engine(model, tokenizer)
    architecture = dataclasses.replace(model.architecture, dropout=0.0)
    wanted = dataclasses.replace(
        executable.plan,
        architecture=architecture,
        device=device,
        compute=compute,
        weights=config.precision.weights or executable.plan.weights,
    )
    executable.require(wanted)
    kernels = executable.kernels()
    if STEP_KERNEL in kernels:
        return Engine(model, tokenizer, NativeDecoder(model, kernels, wanted, release=True))
    decoder = CompiledDecoder(model, kernels, wanted.generation_shapes())
    return Engine(model, tokenizer, decoder)
