"""From a config to a trained run or model, ready to evaluate and to generate.

`api.py` and `train_run.py` open what is there through here; `jobs.py` makes what is new.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.checkpoint import CheckpointState
from penstock.compiler.demands import require_causal
from penstock.compiler.executable import Executable
from penstock.compiler.native import STEP_KERNEL
from penstock.compiler.plan import Plan
from penstock.compiler.runtime import attach
from penstock.config.load import load_config
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.data.tokenizer import Tokenizer
from penstock.data.training_data import TrainingData
from penstock.errors import CheckpointError
from penstock.inference.decoding import CompiledDecoder
from penstock.inference.engine import Engine
from penstock.inference.native import NativeDecoder
from penstock.jobs import (
    DTYPES,
    base_identity,
    base_model,
    empty_model,
    kept_kernels,
    run_folder,
    start_adapters,
)
from penstock.models.frozen_base import make_whole
from penstock.models.hub import model_folder
from penstock.models.lora import adapted
from penstock.models.projection import merge_adapters
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
    config: Config
    """What the run was trained with."""

    def trained(self) -> dict[str, Tensor]:
        """Float32 weights that training has changed, by parameter name."""
        return {
            name.removeprefix("master."): tensor
            for name, tensor in self.state.tensors.items()
            if name.startswith("master.")
        }

    def weights(self) -> dict[str, Tensor]:
        """All float32 weights by parameter name; adapters are merged."""
        if not self._needs_base:
            return self.trained()
        return dict(self.model("fp32", "cpu", merged=True).named_parameters())

    def model(self, compute: str, device: str, *, merged: bool = False) -> Transformer:
        """The trained model, in the given format; `merged`: adapters added to its weights, by
        float32.

        Raises:
            CheckpointError: the weights its adapters stand on are gone, or others.
        """
        architecture, trained = self.plan.architecture, self.trained()
        if not self._needs_base:
            model = empty_model(architecture)
        else:
            self._require_base()
            exact = DTYPES["fp32" if merged else compute]
            model = base_model(self.config.model, architecture, self.config.seed, exact)
            make_whole(model, exact)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])
        if merged:
            merge_adapters(model)
        return model.to(device, DTYPES[compute]).requires_grad_(False)

    @property
    def _needs_base(self) -> bool:
        """Whether some weights are not the run's own, but those it was started from."""
        return "base" in self.state.values["identity"]

    def _require_base(self) -> None:
        """Refuse other weights than those the run was started from."""
        if self.state.values["identity"].get("base") != base_identity(self.config):
            raise CheckpointError(
                f"the weights in {self.config.model.from_} have changed since "
                f"{self.folder.path} was trained on them",
                where="model.from",
                do="put the weights back that it was started from",
            )


def load_run(config: Config) -> LoadedRun:
    """Open a run folder at the checkpoint `checkpoint.use` names.

    Raises:
        CheckpointError: not a run, or damaged.
    """
    folder = run_folder(config)
    plan = folder.read_plan()
    state = folder.state_for(config.checkpoint.use)
    config = load_config(str(folder.config), []).config
    return LoadedRun(folder, plan, Tokenizer.load(folder.tokenizer), state, config)


def require_same_tokenizer(expected: str, dataset: TrainingData, where: str) -> None:
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
            what = _unlike(before.get(name), value)
            raise CheckpointError(
                f"the checkpoint was trained with another {name}: {what}",
                where="run",
                do="give the same settings as before, or another run folder",
            )


def _unlike(before: Any, now: Any) -> str:  # noqa: ANN401 - any JSON value
    """What of two values differs, entry by entry where they have some."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{json.dumps(before)}, here {json.dumps(now)}"
    names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
    return "; ".join(f"{name} {_unlike(before.get(name), now.get(name))}" for name in names)


def attach_for_evaluation(config: Config, loaded: LoadedRun, model: Transformer) -> int | None:
    """Give a loaded model kernels where there are any; returns the rows it then takes at a time,
    each of the plan's sequence length, or None where there are no kernels: any number.
    """
    # Blocks are whole again, and there are no stages.
    plan = dataclasses.replace(loaded.plan, tensor=1, layers_per_stage=())
    if plan.device != "cpu" or (config.precision.compute or plan.compute) != plan.compute:
        return None
    executable = _executable_for(config, "evaluate", ("train", "evaluate"))
    if executable is not None:
        executable.require(dataclasses.replace(plan, mode=executable.plan.mode))
        kernels = executable.kernels()
    elif loaded.plan.tensor > 1:
        return None  # The run's kernels are of parts of blocks.
    else:
        kernels = kept_kernels(loaded.folder, plan, config)
    if kernels is None:
        return None
    attach(model, kernels)
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


def _outside_model(config: Config, compute: str) -> Transformer:
    """The model of `model.from`, with the adapter of `lora.from` merged where there is one."""
    architecture = adapted(resolve_architecture(config.model), config.lora)
    exact = DTYPES[compute if architecture.adapter is None else "fp32"]
    model = base_model(config.model, architecture, config.seed, exact)
    if architecture.adapter is not None:
        make_whole(model, exact)
        start_adapters(model, config.lora, config.seed)
        merge_adapters(model)
    return model.to(DTYPES[compute]).requires_grad_(False)


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
        model, tokenizer = loaded.model(compute, device, merged=True), loaded.tokenizer
    else:
        folder = model_folder(config.model.from_)
        model = _outside_model(config, compute).to(device)
        tokenizer = Tokenizer.load(config.tokenizer.from_ or folder, config.tokenizer.bos)
    require_causal(model.architecture)
    if executable is None:
        if config.precision.weights == "int8":
            round_weights(model)
        return Engine(model, tokenizer)
    architecture = model.architecture.for_generation()
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
