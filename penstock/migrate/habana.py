"""Optimum Habana: run_clm.py, run_mlm.py, run_lora_clm.py, with the Trainer's own arguments."""

import math
from typing import Any

from penstock.migrate.rules import (
    System,
    Values,
    changed,
    if_true,
    maps,
    none,
    none_of,
)

_GAUDI = "describes their device; regions are compiled ahead"
_HUB = "data sets come from files: source.path"
_VERB = "train, evaluate and generate are verbs"

_FIELDS = {
    "n_embd": "hidden_size",
    "hidden_size": "hidden_size",
    "n_layer": "layers",
    "num_hidden_layers": "layers",
    "n_head": "heads",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "n_inner": "mlp_size",
    "intermediate_size": "mlp_size",
    "n_positions": "max_positions",
    "n_ctx": "max_positions",
    "max_position_embeddings": "max_positions",
    "vocab_size": "vocab_size",
    "resid_pdrop": "dropout",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attention_dropout",
    "layer_norm_epsilon": "norm_epsilon",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
    "rotary_pct": "rotary_fraction",
}
"""Fields of Hugging Face configurations, for config_overrides."""


def _overrides(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    pairs = (pair.partition("=") for pair in str(value).split(","))
    return {f"model.{_FIELDS[name.strip()]}": _number(text) for name, _sign, text in pairs}


def _number(text: str) -> Any:  # noqa: ANN401 - a number or a truth
    if text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    value = float(text)
    return int(value) if value.is_integer() else value


def _size(_: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    return {"batch.size": math.prod(int(theirs.get(name, 1)) for name in names)}


def _warmup_ratio(value: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    steps = int(theirs.get("max_steps", -1))
    return {"schedule.warmup": math.ceil(value * steps)} if steps > 0 and value else {}


def _epochs(value: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {} if int(theirs.get("max_steps", -1)) > 0 else {"train.epochs": value}


def _schedule(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    names = {"constant_with_warmup": "constant"}
    return {"schedule.name": names.get(str(value), str(value))}


def _file(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    kinds = {"csv": "csv", "json": "jsonl", "jsonl": "jsonl"}
    kind = kinds.get(str(value).rpartition(".")[2], "text")
    return {"source.path": value, "source.kind": kind}


_MODEL = (
    maps("model_name_or_path", "model.from"),
    maps("model_type", "model.family"),
    none("config_name", "model.preset, or model.family with model.* keys"),
    changed("config_overrides", "model.*", "our names of the fields", _overrides),
    maps("tokenizer_name", "tokenizer.from"),
    changed(
        "torch_dtype",
        "precision.compute",
        "bf16 or fp32",
        lambda v, _: {"precision.compute": "bf16" if "16" in str(v) else "fp32"},
    ),
    none("low_cpu_mem_usage", "always: weights go straight to their place"),
    *none_of(
        "cache_dir use_fast_tokenizer model_revision token use_auth_token trust_remote_code", _HUB
    ),
    none("use_cache", "generation always has a key-value cache"),
)
_DATA = (
    *none_of("dataset_name dataset_config_name", _HUB),
    changed(
        "train_file",
        "source.path, source.kind",
        "for prepare; the kind follows the file's ending",
        _file,
    ),
    none("validation_file", "data.splits, or folders train/ and validation/ under source.path"),
    none("validation_split_percentage", "data.splits=[train,validation,test]"),
    changed(
        "block_size", "data.sequence_length", "the remainder is not dropped but padded at weight 0"
    ),
    changed("max_seq_length", "data.sequence_length", "as block_size"),
    *none_of("max_train_samples", "train.steps"),
    maps("max_eval_samples", "train.evaluate_sequences"),
    none("preprocessing_num_workers", "prepare.workers"),
    none("overwrite_cache", "prepare sees what has changed"),
    changed("keep_linebreaks", "source.keep_newlines", "for source.documents=line"),
    changed("streaming", "data.streaming", "text is read as training goes; see docs"),
    none("dataloader_num_workers", "batches come straight from mapped memory"),
)
_TRAINER = (
    changed("output_dir", "run", "a run folder"),
    none("overwrite_output_dir", "a run folder goes on; name another to start anew"),
    *none_of("do_train do_eval do_predict", _VERB),
    changed(
        "per_device_train_batch_size",
        "batch.micro, batch.size",
        "batch.size is × gradient_accumulation_steps × devices",
        lambda v, theirs: {"batch.micro": v, **_size(v, theirs)},
    ),
    maps("per_device_eval_batch_size", "evaluate.batch"),
    changed("gradient_accumulation_steps", "batch.size", "in sequences", _size),
    maps("learning_rate", "optimizer.lr"),
    changed("weight_decay", "optimizer.weight_decay", "not on biases and norms, nor on embeddings"),
    maps(
        "adam_beta1",
        "optimizer.betas",
        lambda v, theirs: {"optimizer.betas": [v, theirs.get("adam_beta2", 0.999)]},
    ),
    maps(
        "adam_beta2",
        "optimizer.betas",
        lambda v, theirs: {"optimizer.betas": [theirs.get("adam_beta1", 0.9), v]},
    ),
    maps("adam_epsilon", "optimizer.eps"),
    maps("max_grad_norm", "optimizer.clip", lambda v, _: {"optimizer.clip": v} if v else {}),
    maps("num_train_epochs", "train.epochs", _epochs),
    maps("max_steps", "train.steps", lambda v, _: {"train.steps": v} if v > 0 else {}),
    maps("lr_scheduler_type", "schedule.name", _schedule),
    changed("warmup_ratio", "schedule.warmup", "in steps; needs max_steps", _warmup_ratio),
    maps("warmup_steps", "schedule.warmup"),
    maps("logging_steps", "train.log_every"),
    *none_of(
        "logging_dir logging_strategy report_to run_name",
        "metrics.jsonl, TensorBoard files and a report lie in the run folder",
    ),
    changed("save_steps", "checkpoint.every", "in optimizer steps"),
    none("save_strategy", "checkpoint.every; one is always saved at the end"),
    maps("save_total_limit", "checkpoint.keep"),
    none("resume_from_checkpoint", "a run folder goes on from its newest checkpoint"),
    none("load_best_model_at_end", "checkpoint.use=best"),
    *none_of("evaluation_strategy eval_strategy", "train.evaluate_every"),
    maps("eval_steps", "train.evaluate_every"),
    maps("seed", "seed"),
    none("data_seed", "one seed, for everything"),
    maps("bf16", "precision.compute", if_true("precision.compute", "bf16")),
    changed(
        "fp16", "precision.compute", "bf16: no loss scaling", if_true("precision.compute", "bf16")
    ),
    changed(
        "gradient_checkpointing", "plan.recompute", "blocks", if_true("plan.recompute", "blocks")
    ),
    maps(
        "optim",
        "optimizer.name",
        lambda v, _: {"optimizer.name": "muon" if "muon" in str(v) else "adamw"},
    ),
    changed(
        "group_by_length",
        "data.group_by_length, compile.mode",
        "for packings that pad; kernels have one length, so it goes without",
        lambda v, _: {"data.group_by_length": True, "compile.mode": "off"} if v else {},
    ),
    none("deepspeed", "import that file with --from deepspeed, and give both: later keys win"),
    *none_of(
        "remove_unused_columns push_to_hub hub_model_id hub_token ddp_find_unused_parameters",
        "not needed",
    ),
)
_ADAPTERS = (
    maps("lora_rank", "lora.rank"),
    maps("lora_alpha", "lora.alpha"),
    maps("lora_dropout", "lora.dropout"),
    changed(
        "lora_target_modules",
        "lora.targets",
        "our names or theirs, see docs",
        lambda v, _: {"lora.targets": v if isinstance(v, list) else str(v).split()},
    ),
    none("peft_type", "lora"),
    none("dataset_concatenation", "sequences are packed: data.packing"),
    changed(
        "train_on_inputs",
        "source.prompt_weight",
        "1 on the prompt, too, or 0",
        lambda v, _: {"source.prompt_weight": 1.0 if v else 0.0},
    ),
    maps("adapter_name_or_path", "lora.from"),
)
_MASKED = (
    maps("mlm_probability", "train.mask_probability"),
    changed(
        "line_by_line",
        "data.packing",
        "prepare lays each line in a row of its own, padded to data.sequence_length",
        lambda v, _: (
            {"source.documents": "line", "data.packing": "single::truncate_right"} if v else {}
        ),
    ),
    none("pad_to_max_length", "sequences are padded to data.sequence_length"),
)
_DEVICE = (
    *none_of(
        "use_habana use_lazy_mode use_hpu_graphs_for_inference use_hpu_graphs_for_training "
        "use_hpu_graphs gaudi_config_name distribution_strategy pipelining_fwd_bwd",
        _GAUDI,
    ),
    maps("throughput_warmup_steps", "train.throughput_warmup_steps"),
    changed(
        "world_size",
        "plan.replicas",
        "started by `penstock train --processes N`",
        lambda v, theirs: {"plan.replicas": v, **_size(v, theirs)},
    ),
    *none_of("use_mpi use_deepspeed hostfile", "penstock train --processes N, mpirun or torchrun"),
)

HABANA = System(
    name="habana",
    title="Optimum Habana",
    source="huggingface/optimum-habana (examples/language-modeling), TrainingArguments",
    rules=(*_MODEL, *_DATA, *_TRAINER, *_ADAPTERS, *_MASKED, *_DEVICE),
    command="""\
python run_clm.py --model_name_or_path gpt2 --dataset_name wikitext \\
  --dataset_config_name wikitext-2-raw-v1 --per_device_train_batch_size 4 \\
  --per_device_eval_batch_size 4 --do_train --do_eval --output_dir out --use_habana \\
  --use_lazy_mode --use_hpu_graphs_for_inference --throughput_warmup_steps 3 \\
  --gaudi_config_name Habana/gpt2""",
    ours="""\
penstock import-config run.sh --from habana out=job.yaml
penstock prepare --config job.yaml source.path=wikitext-2/ tokenizer.from=gpt2 data.path=dataset
penstock train --config job.yaml data.path=dataset
penstock evaluate --config job.yaml data.path=dataset""",
    defaults={
        "learning_rate": 5e-5,
        "weight_decay": 0.0,
        "num_train_epochs": 3.0,
        "seed": 42,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "logging_steps": 500,
        "block_size": 1024,
    },
)
