"""Graphcore: the arguments of its PyTorch GPT-2 example, pretraining, evaluation, generation."""

from typing import Any

from penstock.migrate.rules import (
    System,
    Values,
    changed,
    choice,
    if_true,
    maps,
    none,
    none_of,
)

_IPU = "describes memory and links inside their chip; `penstock plan` weighs memory by itself"
_STEP = "their step is one call of the host, with device-iterations updates; ours is one update"


def _updates(theirs: Values) -> int:
    return int(theirs.get("device_iterations", 4))


def _steps(key: str) -> Any:  # noqa: ANN401 - a converter
    return lambda value, theirs: {} if value is None else {key: int(value) * _updates(theirs)}


def _size(_: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    factors = ("batch_size", "gradient_accumulation", "replication_factor")
    size = 1
    for name in factors:
        size *= int(theirs.get(name, 1))
    return {"batch.size": size}


def _warmup(value: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    if theirs.get("lr_warmup_steps") is not None:
        return {}
    steps = int(theirs.get("lr_decay_steps") or theirs["training_steps"])
    return {"schedule.warmup": round(float(value) * steps) * _updates(theirs)}


def _stages(value: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {} if isinstance(theirs.get("layers_per_ipu"), list) else {"plan.stages": int(value)}


def _layers(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {"plan.layers_per_stage": value} if isinstance(value, list) else {}


def _chunks(_: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    if not theirs.get("enable_sequence_serialized"):
        return {}
    tokens = int(theirs.get("batch_size", 1)) * int(theirs.get("max_len", 128))
    return {"plan.loss_chunks": max(1, tokens // int(theirs.get("serialized_seq_len", 128)))}


def _factor(value: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {"plan.loss_chunks": int(value), **_chunks(value, theirs)}


def _train_path(value: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    if value == "tfrecord":
        return {"data.path": str(theirs.get("tfrecord_path", "DATASET"))}
    if value == "dynamic":
        return {"data.path": str(theirs.get("data_prefix", "DATASET"))}
    return {"source.kind": value} if value == "generated" else {"data.path": str(value)}


_MODELS = {"gpt2_test": "gpt2-tiny"}
_CONVERTED = "opened as it is; tokenizer.from names the tokenizer"

GRAPHCORE = System(
    name="graphcore",
    title="Graphcore GPT-2",
    source="graphcore/examples (nlp/gpt2/pytorch)",
    rules=(
        maps("model", "model.preset", choice("model.preset", **{"gpt2-test": "gpt2-tiny"})),
        maps("max_len", "data.sequence_length"),
        maps("seq_length", "data.sequence_length"),
        maps("pretrained_checkpoint", "model.from", lambda v, _: {"model.from": v or None}),
        maps("checkpoint_input_dir", "model.from"),
        maps("save_model_path", "run"),
        changed(
            "train_path",
            "data.path",
            _CONVERTED + "; generated is source.kind=generated, for prepare",
            _train_path,
        ),
        changed("tfrecord_path", "data.path", _CONVERTED, lambda v, _: {}),
        changed("data_prefix", "data.path", _CONVERTED, lambda v, _: {}),
        none("stride", "training windows follow each other; every token is a target once an epoch"),
        none("val_num", "data.splits sets the share of validation text"),
        maps("seed", "seed"),
        *none_of("num_workers async_dataloader", "batches come straight from mapped memory"),
        none("custom_ops", "regions are compiled as a whole"),
        none("epochs", "train.steps, as their own program stops by training-steps too"),
        changed("training_steps", "train.steps", _STEP, _steps("train.steps")),
        maps("batch_size", "batch.micro"),
        changed(
            "gradient_accumulation", "batch.size", "batch-size × this × replication-factor", _size
        ),
        maps("optimizer", "optimizer.name", choice("optimizer.name", adamw="adamw")),
        maps("weight_decay", "optimizer.weight_decay"),
        maps("learning_rate", "optimizer.lr"),
        *none_of(
            "loss_scaling auto_loss_scaling",
            "compute is bf16 with float32 masters: nothing overflows",
        ),
        maps("lr_schedule", "schedule.name"),
        changed("lr_warmup", "schedule.warmup", "in steps, not a share of them", _warmup),
        changed("lr_warmup_steps", "schedule.warmup", _STEP, _steps("schedule.warmup")),
        none("lr_decay_steps", "the decay ends with the run"),
        changed("log_steps", "train.log_every", _STEP, _steps("train.log_every")),
        none("save_per_epochs", "checkpoint.every counts steps; one is always saved at the end"),
        changed("save_per_steps", "checkpoint.every", _STEP, _steps("checkpoint.every")),
        none("use_wandb", "TensorBoard files and an HTML report are written"),
        none(
            "resume_training_from_checkpoint",
            "a run folder always goes on from its newest checkpoint",
        ),
        changed(
            "layers_per_ipu",
            "plan.layers_per_stage",
            "a list; one number is plan.stages alone",
            _layers,
        ),
        changed("device_iterations", "train.steps", _STEP, lambda v, _: {}),
        changed(
            "replication_factor",
            "plan.replicas",
            "the batch is batch.size over all of them",
            lambda v, theirs: {"plan.replicas": v, **_size(v, theirs)},
        ),
        maps("ipus_per_replica", "plan.stages", _stages),
        none("matmul_proportion", _IPU),
        changed(
            "recompute_checkpoint_every_layer",
            "plan.recompute",
            "blocks: a block's input is kept",
            if_true("plan.recompute", "blocks"),
        ),
        changed(
            "recompute_checkpoint_layers",
            "plan.recompute",
            "all blocks, not chosen ones",
            if_true("plan.recompute", "blocks"),
        ),
        changed(
            "embedding_serialization_factor",
            "plan.loss_chunks",
            "pieces of tokens, not of the vocabulary",
            _factor,
        ),
        changed(
            "enable_sequence_serialized",
            "plan.loss_chunks",
            "as many pieces as serialized-seq-len gives",
            _chunks,
        ),
        changed(
            "serialized_seq_len",
            "plan.loss_chunks",
            "tokens per piece there, pieces here",
            lambda v, _: {},
        ),
        none("remap_logit", _IPU),
        none("optimizer_state_offchip", _IPU),
        changed(
            "replicated_tensor_sharding",
            "plan.shard",
            "optimizer: its state over the replicas (ZeRO-1)",
            if_true("plan.shard", "optimizer"),
        ),
        none("enable_half_partials", "sums are float32"),
        changed("executable_cache_dir", "compile.cache", "kernels by content, not whole programs"),
        none("compile_only", "penstock compile"),
        maps(
            "task",
            "evaluate.tasks",
            lambda v, _: {
                "evaluate.tasks": ["lambada" if "lambada" in str(v).lower() else "wikitext"]
            },
        ),
        maps("valid_data", "evaluate.task_data"),
        changed(
            "overlapping_eval", "evaluate.stride", "half the window here when not given, 32 there"
        ),
        none("tokenizer_type", "the model's own tokenizer"),
        none("eod_mask_loss", "end-of-text is a token as others"),
        none("strict_lambada", "both accuracies are given, the strict one first"),
        none("log_interval", "progress is always shown"),
        maps("model_name_or_path", "model.from"),
        changed("fp16", "precision.compute", "bf16", if_true("precision.compute", "bf16")),
        *none_of("single_ipu poptorch_loop", _IPU),
        none("input_len", "prompts may have any length"),
        maps("output_len", "generate.tokens"),
    ),
    command="""\
python train_gpt2.py --model gpt2 --ipus-per-replica 4 --replication-factor 4 \\
  --layers-per-ipu 0 4 4 4 --gradient-accumulation 2048 --device-iterations 8 --batch-size 1 \\
  --max-len 1024 --optimizer AdamW --learning-rate 0.00015 --lr-schedule cosine --lr-warmup 0.01 \\
  --training-steps 10000 --weight-decay 0.01 --recompute-checkpoint-every-layer True \\
  --replicated-tensor-sharding True --train-path tfrecord --tfrecord-path wiki/*.tfrecord""",
    ours="""\
penstock import-config pretraining_small.sh --from graphcore out=job.yaml
penstock plan --config job.yaml plan.target=graphcore-pod16 out=plan
penstock train --config job.yaml tokenizer.from=gpt2 plan.layers_per_stage=null \\
  plan.replicas=1 plan.shard=none
penstock evaluate --config job.yaml tasks=[wikitext,lambada] task_data=FOLDER""",
    defaults={
        "training_steps": 10000,
        "device_iterations": 4,
        "batch_size": 1,
        "max_len": 128,
        "learning_rate": 1e-5,
        "weight_decay": 0.0,
        "lr_schedule": "constant",
        "lr_warmup": 0.1,
    },
    implied={"optimizer.betas": [0.9, 0.999], "optimizer.clip": None},
    notes=("Replicas train with `penstock train --processes N`; see docs/parallel.md.",),
)
