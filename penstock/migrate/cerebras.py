"""Cerebras Model Zoo: the params YAML and flags of its PyTorch GPT-2, and its preprocessing."""

from typing import Any

from penstock.migrate.rules import System, Values, changed, choice, maps, none, none_of

_WAFER = "describes their wafer and its loader"
_FIXED = "fixed by the family"
_SCALING = "weights and losses need no scaling: compute is bf16 with float32 masters"


def _schedule(value: Any, _: Values) -> Values:  # noqa: ANN401 - a number or a list of pieces
    """A warm-up piece and a decaying one; a number is constant."""
    if not isinstance(value, list):
        return {"optimizer.lr": value, "schedule.name": "constant"}
    pieces = list(value)
    ours: dict[str, Any] = {"schedule.name": "constant"}
    first = pieces[0]
    rises = first.get("end_learning_rate", 0) > first.get("initial_learning_rate", 0)
    if len(pieces) > 1 and rises:
        ours["schedule.warmup"] = int(first["total_iters"])
        pieces = pieces[1:]
    last = pieces[-1]
    ours["optimizer.lr"] = float(last.get("initial_learning_rate", last.get("learning_rate")))
    kind = str(last["scheduler"]).lower().removesuffix("decay").removesuffix("lr")
    if kind != "constant":
        ours["schedule.name"] = kind
        ours["schedule.min_lr"] = float(last.get("end_learning_rate", 0.0))
    return ours


def _mixed(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {"precision.compute": "bf16" if value else "fp32"}


def _mode(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {"mode": "evaluate"} if value == "eval" else {}


_MODEL = (
    maps("model.hidden_size", "model.hidden_size"),
    maps("model.vocab_size", "model.vocab_size"),
    none("model.position_embedding_type", _FIXED + ": learned in gpt2, rotary in gptj and llama"),
    maps("model.share_embedding_weights", "model.tie_embeddings"),
    maps("model.max_position_embeddings", "model.max_positions"),
    maps("model.num_hidden_layers", "model.layers"),
    maps("model.dropout_rate", "model.dropout"),
    maps("model.layer_norm_epsilon", "model.norm_epsilon"),
    none("model.loss_scaling", "the loss is always the mean over the batch's weighted tokens"),
    none("model.loss_weight", "1 is the loss itself; the learning rate scales it"),
    maps("model.num_heads", "model.heads"),
    none("model.attention_type", "scaled dot product"),
    maps("model.attention_dropout_rate", "model.attention_dropout"),
    *none_of(
        "model.use_projection_bias_in_attention model.use_ffn_bias_in_attention "
        "model.use_ffn_bias model.use_bias_in_output",
        _FIXED,
    ),
    maps("model.filter_size", "model.mlp_size"),
    none("model.nonlinearity", _FIXED + ": gelu with tanh in gpt2"),
    changed("model.mixed_precision", "precision.compute", "bf16, masters in float32", _mixed),
    maps(
        "model.fp16_type",
        "precision.compute",
        choice("precision.compute", bfloat16="bf16", cbfloat16="bf16", float16="bf16"),
    ),
)
_OPTIMIZER = (
    maps("optimizer.optimizer_type", "optimizer.name", choice("optimizer.name", adamw="adamw")),
    maps("optimizer.betas", "optimizer.betas"),
    *none_of("optimizer.correct_bias", "moments are always corrected"),
    maps("optimizer.eps", "optimizer.eps"),
    maps("optimizer.max_gradient_norm", "optimizer.clip"),
    changed(
        "optimizer.learning_rate",
        "optimizer.lr, schedule.*",
        "a rising first piece is schedule.warmup, the last piece the decay, to the run's end",
        _schedule,
    ),
    changed("optimizer.weight_decay", "optimizer.weight_decay", "matrices only"),
    changed("optimizer.weight_decay_rate", "optimizer.weight_decay", "matrices only"),
    *none_of(
        "optimizer.initial_loss_scale optimizer.max_loss_scale optimizer.loss_scaling_factor",
        _SCALING,
    ),
)
_RUN = (
    maps("runconfig.max_steps", "train.steps"),
    maps("runconfig.log_steps", "train.log_every"),
    maps("runconfig.checkpoint_steps", "checkpoint.every"),
    none("runconfig.save_initial_checkpoint", "the seed makes the first weights again"),
    maps("runconfig.seed", "seed"),
    maps("runconfig.model_dir", "run"),
    changed(
        "runconfig.eval_steps",
        "train.evaluate_sequences",
        "their batches × eval_input.batch_size, in sequences",
        lambda value, theirs: {
            "train.evaluate_sequences": value * int(theirs.get("eval_input.batch_size", 1))
        },
    ),
    *none_of("runconfig.num_csx runconfig.num_steps runconfig.num_wgt_servers", _WAFER),
)
_FLAGS = (
    none("params", "--config"),
    changed("mode", "mode", "train and evaluate are verbs; train evaluates as it goes", _mode),
    maps("model_dir", "run"),
    none("validate_only", "penstock plan: checks shapes, memory and time in a second"),
    none("compile_only", "penstock compile"),
    none("cs_ip", _WAFER),
    none("checkpoint_path", "a run goes on from its newest; another's weights: model.from=RUN"),
)


def _input_rules(name: str, target: str) -> tuple[Any, ...]:
    convert = f"HDF5 files are opened as they are, in splits by their names: {target} is this one"
    path = (
        changed(f"{name}.data_dir", "data.path", convert)
        if name == "train_input"
        else none(f"{name}.data_dir", convert)
    )
    size = (
        maps(f"{name}.batch_size", "batch.size")
        if name == "train_input"
        else none(f"{name}.batch_size", "see runconfig.eval_steps")
    )
    return (
        none(f"{name}.data_processor", "formats are recognised by their content"),
        path,
        changed(f"{name}.max_sequence_length", "data.sequence_length", "for both inputs"),
        size,
        maps(f"{name}.micro_batch_size", "batch.micro"),
        none(f"{name}.shuffle", "training data is always shuffled, evaluation data never"),
        none(f"{name}.shuffle_seed", "one seed, for everything"),
        *none_of(
            f"{name}.num_workers {name}.prefetch_factor {name}.persistent_workers",
            "batches come straight from mapped memory",
        ),
    )


_PROCESSING = (
    none("files_per_record", "data.files"),
    maps("max_seq_length", "data.sequence_length"),
    none("short_seq_prob", "sequences are never cut short at random"),
    *none_of("eos_id pad_id", "the tokenizer knows"),
    *none_of("use_ftfy ftfy_normalizer wikitext_detokenize", "text is taken as it is"),
    changed(
        "pack_sequences",
        "data.packing",
        "greedy::truncate_right, or full",
        lambda on, _: {"data.packing": "greedy::truncate_right" if on else "full"},
    ),
    *none_of("min_sequence_len input_ids_dtype write_remainder", "chosen from the data"),
    none("resume_from_checkpoint", "prepare always goes on where it stopped"),
    maps("jsonl_key", "source.text_key"),
    maps("prompt_key", "source.prompt_key"),
    maps("completion_key", "source.completion_key"),
)

CEREBRAS = System(
    name="cerebras",
    title="Cerebras Model Zoo",
    source="Cerebras/modelzoo (transformers/pytorch/gpt2, hdf5_preprocessing)",
    rules=(
        *_input_rules("train_input", "train"),
        *_input_rules("eval_input", "validation"),
        *_MODEL,
        *_OPTIMIZER,
        *_RUN,
        *_FLAGS,
        *_PROCESSING,
    ),
    command="""\
python run.py CSX --mode train --params params_gpt2_small.yaml --validate_only
python run.py CSX --mode train --params params_gpt2_small.yaml --compile_only
python run.py CSX --mode train_and_eval --params params_gpt2_small.yaml --model_dir model_dir""",
    ours="""\
penstock import-config params_gpt2_small.yaml --from cerebras out=job.yaml
penstock plan --config job.yaml
penstock compile --config job.yaml
penstock train --config job.yaml""",
    notes=(
        "Their batch_size is all of a step's sequences (batch.size); batch.micro is how many the "
        "device takes at once, chosen by `penstock plan`.",
    ),
)
