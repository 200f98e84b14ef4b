"""From a config to a plan: device, target, dataset, architecture, and what a plan may be used for.

`api.py` and `train_run.py` call it before anything is compiled or allocated. It must not import
torch, so that planning answers at once; it does so only to ask a GPU's driver.
"""

import dataclasses
from pathlib import Path

from penstock.compiler.demands import check_generic, check_objective
from penstock.compiler.plan import Plan
from penstock.compiler.planner import make_generation_plan, make_plan
from penstock.compiler.probe import detected_target
from penstock.config.schema import Config
from penstock.data.dataset import MANIFEST, Dataset
from penstock.data.training_data import TrainingData
from penstock.errors import ConfigError, DataError, DoesNotFitError
from penstock.hardware.detect import free_memory_bytes, gpus
from penstock.hardware.target import Target, load_target
from penstock.models.adapter import held_base
from penstock.models.hub import model_folder
from penstock.models.lora import adapted
from penstock.models.parameters import count_frozen
from penstock.models.resolve import resolve_architecture


def device_of(config: Config) -> str:
    """Cpu or cuda; a clear refusal where CUDA was asked for and is not there."""
    if config.device == "cpu" or (config.device == "auto" and not gpus()):
        return "cpu"
    import torch  # noqa: PLC0415 - only where there is a GPU, or one is asked for

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
    if config.plan.target == "cpu":
        return detected_target("cpu")
    return load_target(config.plan.target)


def open_training_data(config: Config) -> TrainingData:
    """What `train` trains on: the dataset `data.path` names, a mixture, or a stream of text."""
    data = config.data
    given = {"data.path": data.path, "data.mixture": data.mixture}
    named = [name for name, value in given.items() if value is not None]
    named += ["data.streaming"] if data.streaming else []
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} are all set", where="data", do="keep one of them")
    if data.streaming:
        from penstock.data.streaming import open_stream  # noqa: PLC0415 - sources are heavy

        return open_stream(config.source, config.tokenizer, data, config.clean)
    if data.mixture is None:
        if data.path is None:
            raise ConfigError(
                "no dataset",
                where="data.path",
                do="set data.path=FOLDER, data.mixture or data.streaming",
            )
        return open_dataset(config)
    from penstock.data.mixture import open_mixture  # noqa: PLC0415 - as above

    return open_mixture(data, config.tokenizer)


def named_training_data(config: Config) -> TrainingData | None:
    """What there is to train on, where anything is named."""
    data = config.data
    is_named = data.path is not None or data.mixture is not None or data.streaming
    return open_training_data(config) if is_named else None


def open_dataset(config: Config) -> Dataset:
    """The dataset `data.path` names, in any format."""
    data = config.data
    if data.path is None:
        raise ConfigError("no dataset", where="data.path", do="set data.path=FOLDER")
    if (Path(data.path) / MANIFEST).is_file():
        return Dataset.open(data.path, data.verify)
    from penstock.data.members import open_any  # noqa: PLC0415 - formats' libraries are heavy

    return open_any(Path(data.path), data, config.tokenizer)


def plan_of(config: Config, dataset: TrainingData | None, mode: str = "train") -> Plan:
    """Decide the step for what the config describes; the vocabulary is the dataset's, and for
    evaluating or generating the whole model is the run's, where they are named.
    """
    run = None if mode == "train" or config.run is None else _plan_of_run(config.run)
    if run is None:
        vocab_size = None if dataset is None else dataset.vocab_size
        architecture = adapted(resolve_architecture(config.model, vocab_size), config.lora)
    else:
        architecture = run.architecture
    check_objective(architecture, config.train.objective if run is None else "auto", mode)
    check_generic(architecture, config.plan, config.data.attention)
    length = config.data.sequence_length
    if length is None and dataset is not None:
        length = dataset.sequence_length
    length = length or architecture.max_positions
    compute = config.precision.compute or (None if run is None else run.compute)
    target = target_of(config)
    if mode == "generate":
        rows = config.generate.batch
        return make_generation_plan(
            architecture,
            batch=rows,
            compute=compute,
            weights=config.precision.weights,
            capacity=length,
            target=target,
        )
    plan = make_plan(
        architecture,
        batch=config.batch,
        # Only training divides blocks.
        plan=config.plan if mode == "train" else config.plan.model_copy(update={"tensor": 1}),
        compute=compute,
        sequence_length=length,
        target=target,
        optimizer=config.optimizer.name,
        saves=mode == "train" and config.checkpoint.every is not None,
        resumes=mode == "train" and _has_checkpoint(config),
        compiled=config.compile.mode != "off" and architecture.generic is None,
        frozen=count_frozen(architecture, config.train.freeze),
        attention=config.data.attention if run is None else run.attention,
    )
    is_here = config.plan.target in ("detect", "cpu")
    advice = (*plan.advice, *_mind_others(plan, free_memory_bytes() if is_here else None))
    return dataclasses.replace(plan, mode=mode, advice=advice)


def _mind_others(plan: Plan, free: int | None) -> tuple[str, ...]:
    """A word on what other programs leave, where the plan is for this machine's own memory."""
    needed = plan.memory["total"] * plan.stages * plan.replicas * plan.tensor
    if plan.device != "cpu" or not plan.fits or free is None or needed <= free:
        return ()
    return (
        f"Other programs leave {free / 2**30:.1f} GiB of it free now, less than is needed: "
        "stop some of them before training.",
    )


def _has_checkpoint(config: Config) -> bool:
    """Whether training would go on from a checkpoint."""
    if config.run is None or config.checkpoint.resume == "never":
        return False
    return any(Path(config.run, "checkpoints").glob("step-*"))


def _plan_of_run(path: str) -> Plan:
    """What the run in a folder was trained by."""
    from penstock.training.run_folder import RunFolder  # noqa: PLC0415 - it loads torch

    return RunFolder(path).read_plan()


def require_fit(plan: Plan) -> None:
    """Refuse a plan that needs more memory than there is."""
    if not plan.fits:
        needed, limit = (size / 2**30 for size in (plan.memory["total"], plan.memory_limit_bytes))
        raise DoesNotFitError(
            f"one step needs {needed:.2f} GiB, {plan.target} has {limit:.2f} GiB",
            where="plan",
            do=" ".join(plan.advice),
        )


def with_replicas(config: Config, processes: int) -> Config:
    """The config with a replica for each process, where it does not say how many."""
    if processes == 1 or "replicas" in config.plan.model_fields_set:
        return config
    stages = len(config.plan.layers_per_stage or ()) or config.plan.stages or 1
    each = stages * config.plan.tensor
    plan = config.plan.model_copy(update={"replicas": max(1, processes // each)})
    return config.model_copy(update={"plan": plan})


def require_tokenizer_of_model(config: Config, data: TrainingData) -> None:
    """Refuse data of another tokenizer than the one that lies beside the weights of `model.from`.

    Nothing is compared where there is none, or where the user names a tokenizer.
    """
    if config.model.from_ is None or config.tokenizer.from_ is not None:
        return
    from penstock.data.tokenizer import Tokenizer  # noqa: PLC0415 - not where plans are made

    try:
        own = Tokenizer.load(model_folder(config.model.from_))
    except DataError:
        return
    found = own.contradiction(data.tokenizer())
    if found is not None:
        raise DataError(
            f"{data.path} was made with another tokenizer than {config.model.from_} has: {found}",
            where="data.path",
            do=f"prepare the data with tokenizer.from={config.model.from_}, "
            "or name the data's own as tokenizer.from to use it all the same",
        )


def require_here(config: Config, plan: Plan, processes: int = 1) -> None:
    """Refuse to train a plan for another kind of device, or for another number of processes."""
    here = device_of(config)
    if plan.device != here:
        raise ConfigError(
            f"the plan is for {plan.target} ({plan.device}), training runs on {here}",
            where="plan.target",
            do="leave plan.target out to train; `penstock plan` plans for any machine",
        )
    needed = plan.replicas * plan.stages * plan.tensor
    if needed != processes:
        of = f" of {plan.stages} stages" if plan.stages > 1 else ""
        of += f" with {plan.tensor} processes for each block" if plan.tensor > 1 else ""
        raise ConfigError(
            f"the plan is for {plan.replicas} replica{'s' * (plan.replicas > 1)}{of}, the job has "
            f"{processes} {'process' if processes == 1 else 'processes'}",
            where="plan.stages"
            if plan.stages > 1
            else ("plan.tensor" if plan.tensor > 1 else "plan.replicas"),
            do=f"start it with --processes {needed}, or change plan.replicas",
        )
    if plan.shard != "none" and held_base(plan.architecture.adapter):
        raise ConfigError(
            f"plan.shard={plan.shard} divides weights that are numbers, not lora.base's bits",
            where="lora.base",
            do="leave it out, or use plan.shard=none",
        )
    if plan.shard != "none" and config.optimizer.name != "adamw":
        raise ConfigError(
            f"optimizer.name={config.optimizer.name} needs whole matrices, "
            f"plan.shard={plan.shard} divides them",
            where="plan.shard",
            do="use plan.shard=none, or optimizer.name=adamw",
        )


def _lora_of(config: Config, plan: Plan) -> dict[str, object]:
    """The user's `lora` section, and where it says nothing the executable's adapters."""
    given, adapter = (
        config.lora.model_dump(exclude_unset=True, by_alias=True),
        plan.architecture.adapter,
    )
    if adapter is None or given.get("from") is not None:
        return given
    sites = [site.name for site in adapter.sites]
    own = {"rank": adapter.rank, "alpha": adapter.alpha, "dropout": adapter.dropout}
    return {**own, "targets": sites, **given}


def follow_executable(config: Config, plan: Plan) -> Config:
    """Fill in what the user left open with what an executable was compiled for."""
    model = config.model.model_dump(exclude_unset=True)
    if not {"preset", "from_", "from"} & model.keys():
        shape = dataclasses.asdict(plan.architecture)
        known = set(type(config.model).model_fields) - {"preset", "from_"}
        model = {**{k: v for k, v in shape.items() if k in known}, **model}
    given = {
        "model": model,
        "lora": _lora_of(config, plan),
        "batch": {"micro": plan.micro, **config.batch.model_dump(exclude_unset=True)},
        "data": {
            "sequence_length": plan.sequence_length,
            "attention": plan.attention,
            **config.data.model_dump(exclude_unset=True),
        },
        "precision": {"compute": plan.compute, **config.precision.model_dump(exclude_unset=True)},
        "plan": {
            "loss_chunks": plan.loss_chunks,
            "recompute": plan.recompute,
            **config.plan.model_dump(exclude_unset=True),
        },
    }
    sections = {name: type(getattr(config, name)).model_validate(v) for name, v in given.items()}
    return config.model_copy(update=sections)
