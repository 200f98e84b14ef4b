"""SambaNova: the generative tutorial's arguments, generative_data_prep's, the Model Zoo's."""

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

_RDU = "describes their chip; `penstock plan` places the work"


def _length(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {} if value == -1 else {"data.sequence_length": value}


def _shuffle(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {} if str(value) == "False" else {"data.shuffle": True}


def _packing(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {"data.packing": str(value)}


def _boundary(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {"source.packing_boundary": {"jsonl": "document"}.get(str(value), "pair")}


def _attention(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {"source.attention_boundary": {"jsonl": "document"}.get(str(value), "pair")}


def _ratios(_: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
    dev, test = (theirs.get(f"{name}_ratio", 0) for name in ("dev", "test"))
    if not all(isinstance(share, int | float) for share in (dev, test)):
        return {"data.splits": [dev, test]}  # for the schema to judge
    return {"data.splits": [round(1 - dev - test, 9), dev, test]}


def _files(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {"data.files": value, "data.format": "sambanova"}


def _categories(_: Any, __: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {"source.category_key": "category", "data.format": "sambanova"}


def _input(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    kind = "jsonl" if str(value).endswith(".jsonl") else "text"
    return {"source.path": value, "source.kind": kind}


_TRAINING = (
    maps("model_name_or_path", "model.from"),
    none("config_name", "a JSON of model settings: set the same as model.* keys"),
    none("cache_dir", "the hub's own cache is used"),
    changed(
        "max_seq_length", "data.sequence_length", "-1, the model's own, is to leave it out", _length
    ),
    changed("batch_size", "batch.micro", "per device and step; batch.size accumulates more"),
    changed("weight_decay", "optimizer.weight_decay", "not on biases and norms, nor on embeddings"),
    maps("max_grad_norm_clip", "optimizer.clip"),
    maps("learning_rate", "optimizer.lr"),
    maps("dropout", "model.dropout"),
    changed(
        "prompt_loss_weight",
        "source.prompt_weight",
        "given when the data is prepared; their published function gives it to padding by mistake",
    ),
    changed("data_dir", "data.path", "a folder of its HDF5 files is opened as it is"),
    maps("steps", "train.steps"),
    maps("min_eval_acc", "evaluate.min_accuracy"),
    none("subsample_eval", "a share of the evaluation data; evaluate.limit is a count"),
    changed("checkpoint_name", "run", "a run folder with all checkpoints, not one file"),
    changed("pef_name", "executable", "a file with its path, not a name in a folder"),
    maps("pef", "executable"),
    none("output_folder", "executable and run are paths"),
    *none_of("num_tiles arch resources_scaling_factors log_level", _RDU),
    changed("inference", "mode", "compile mode=generate", if_true("mode", "generate")),
    maps("max_tokens_to_generate", "generate.tokens"),
    none("examples_to_generate", "generate.input: as many lines as are wanted"),
)
_PREPARE = (
    changed("input_path", "source.path, source.kind", "the kind follows the file's ending", _input),
    changed("input_file_path", "source.path, source.kind", "as input_path", _input),
    maps("output_path", "data.path"),
    maps("pretrained_tokenizer", "tokenizer.from"),
    changed("input_packing_config", "data.packing", "style::overflow, the same words", _packing),
    changed("packing_boundary", "source.packing_boundary", "jsonl is document here", _boundary),
    changed(
        "attention_boundary",
        "source.attention_boundary",
        "jsonl is document here; data.attention=document confines ours, to end-of-text",
        _attention,
    ),
    changed(
        "shuffle", "data.shuffle", "on_RAM and large_file are one: memory is bounded", _shuffle
    ),
    none("apply_chat_template", "records with source.messages_key are laid out by the template"),
    changed(
        "num_training_splits",
        "data.files, data.format",
        "files of each split, not of train alone",
        _files,
    ),
    *none_of("num_dev_splits num_test_splits", "data.files holds for all splits"),
    changed("dev_ratio", "data.splits", "shares of documents, not of files", _ratios),
    changed("test_ratio", "data.splits", "as dev_ratio", _ratios),
    maps("prompt_keyword", "source.prompt_key"),
    maps("completion_keyword", "source.completion_key"),
    maps("num_workers", "prepare.workers"),
    none("do_not_balance_hdf5", "files are balanced"),
    none("keep_split_jsonls", "no intermediate files are written"),
    maps("prompt_prefix", "source.prompt_prefix"),
    maps("prompt_postfix", "source.prompt_postfix"),
    changed(
        "categories_path",
        "source.category_key, source.categories, data.format",
        "set source.categories to the list in that file",
        _categories,
    ),
    changed(
        "ignore_input_format_error",
        "source.on_error",
        "what is left out is counted and told",
        if_true("source.on_error", "skip"),
    ),
    changed(
        "disable_space_separator",
        "source.one_space",
        "the switch is the other way round",
        if_true("source.one_space", False),
    ),
    changed(
        "keep_prompt_only_sequences",
        "source.keep_prompt_only",
        "a word shorter",
        if_true("source.keep_prompt_only", True),
    ),
)
_ZOO = (
    none("command", "compile and run are the verbs compile and train"),
    none("checkpoint.config_name", "a JSON of model settings: set the same as model.* keys"),
    maps("checkpoint.model_name_or_path", "model.from"),
    maps("model.max_seq_length", "data.sequence_length"),
    changed(
        "training.batch_size", "batch.micro", "per device and step; batch.size accumulates more"
    ),
    changed("training.dataset", "data.path", "as data_dir"),
    none("samba_compile.arch", _RDU),
    none("samba_compile.debug", _RDU),
    maps("samba_run.pef", "executable"),
)

SAMBANOVA = System(
    name="sambanova",
    title="SambaNova",
    source="sambanova/tutorials (generative_nlp), sambanova/generative_data_prep, Model Zoo apps",
    rules=_TRAINING + _PREPARE + _ZOO,
    command="""\
python3 generative_train.py compile --max_seq_length 1024 --batch-size 16 --weight_decay 0.1 \\
  --max_grad_norm_clip 1.0 --model_name_or_path gpt2 --pef-name=train --num-tiles 4
python3 generative_train.py run --max_seq_length 1024 --batch-size 16 --weight_decay 0.1 \\
  --max_grad_norm_clip 1.0 --data_dir hdf5/ --checkpoint_name out/800.pt \\
  --model_name_or_path gpt2 --steps 800 --min_eval_acc 0.87 --pef train.pef""",
    ours="""\
penstock import-config run.sh --from sambanova out=job.yaml
penstock compile --config job.yaml
penstock train --config job.yaml
penstock evaluate --config job.yaml tasks=[sst2] task_data=dev.jsonl""",
    notes=(
        "The learning rate is constant after the start, as theirs is; `schedule.*` offers more.",
        "A run's weights go back to the Hugging Face layout by `penstock convert checkpoint`.",
    ),
    defaults={
        "learning_rate": 7.5e-6,
        "weight_decay": 0.1,
        "max_grad_norm_clip": 1.0,
        "dropout": 0.1,
    },
    implied={"schedule.name": "constant"},
)
