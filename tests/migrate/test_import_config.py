"""Configurations of other systems, key by key."""

import json
from pathlib import Path

import pytest
import yaml

import penstock
from penstock.cli import main
from penstock.config.keys import all_keys
from penstock.config.load import load_config
from penstock.errors import ConfigError
from penstock.migrate.pages import pages
from penstock.migrate.reading import read_their_config
from penstock.migrate.systems import SYSTEMS

ROOT = Path(__file__).resolve().parent.parent.parent

KNOWN = {
    "sambanova": """
        model_name_or_path config_name cache_dir max_seq_length batch_size weight_decay
        max_grad_norm_clip learning_rate dropout prompt_loss_weight data_dir steps min_eval_acc
        subsample_eval checkpoint_name pef_name output_folder num_tiles arch pef log_level inference
        resources_scaling_factors max_tokens_to_generate examples_to_generate
        input_path output_path pretrained_tokenizer input_packing_config shuffle apply_chat_template
        num_training_splits num_dev_splits num_test_splits dev_ratio test_ratio prompt_keyword
        completion_keyword num_workers do_not_balance_hdf5 keep_split_jsonls prompt_prefix
        prompt_postfix categories_path packing_boundary attention_boundary disable_space_separator
        keep_prompt_only_sequences
        command checkpoint.config_name checkpoint.model_name_or_path model.max_seq_length
        training.batch_size training.dataset samba_compile.arch samba_run.pef samba_compile.debug""",
    "cerebras": """
        train_input.data_processor train_input.data_dir train_input.max_sequence_length
        train_input.batch_size train_input.shuffle train_input.shuffle_seed train_input.num_workers
        train_input.prefetch_factor train_input.persistent_workers eval_input.data_processor
        eval_input.data_dir eval_input.max_sequence_length eval_input.batch_size eval_input.shuffle
        eval_input.num_workers model.hidden_size model.vocab_size model.position_embedding_type
        model.share_embedding_weights model.max_position_embeddings model.num_hidden_layers
        model.dropout_rate model.layer_norm_epsilon model.loss_scaling model.loss_weight
        model.num_heads model.attention_type model.attention_dropout_rate
        model.use_projection_bias_in_attention model.use_ffn_bias_in_attention model.filter_size
        model.nonlinearity model.use_ffn_bias model.use_bias_in_output model.mixed_precision
        optimizer.optimizer_type optimizer.betas optimizer.eps optimizer.max_gradient_norm
        optimizer.learning_rate optimizer.weight_decay optimizer.weight_decay_rate
        optimizer.initial_loss_scale optimizer.max_loss_scale runconfig.max_steps
        runconfig.log_steps runconfig.checkpoint_steps runconfig.save_initial_checkpoint
        runconfig.seed runconfig.model_dir runconfig.eval_steps
        mode params model_dir validate_only compile_only cs_ip checkpoint_path
        files_per_record max_seq_length short_seq_prob eos_id pad_id use_ftfy ftfy_normalizer
        wikitext_detokenize pack_sequences min_sequence_len input_ids_dtype write_remainder
        resume_from_checkpoint jsonl_key prompt_key completion_key""",
    "graphcore": """
        model max_len train_path tfrecord_path data_prefix stride val_num epochs training_steps
        batch_size gradient_accumulation optimizer weight_decay learning_rate loss_scaling
        auto_loss_scaling lr_schedule lr_warmup lr_warmup_steps lr_decay_steps save_per_epochs
        save_per_steps use_wandb layers_per_ipu device_iterations replication_factor
        ipus_per_replica matmul_proportion recompute_checkpoint_every_layer
        recompute_checkpoint_layers embedding_serialization_factor enable_sequence_serialized
        serialized_seq_len remap_logit optimizer_state_offchip replicated_tensor_sharding
        enable_half_partials executable_cache_dir compile_only async_dataloader
        model_name_or_path fp16 single_ipu poptorch_loop input_len output_len
        seq_length overlapping_eval strict_lambada pretrained_checkpoint save_model_path seed
        num_workers log_steps resume_training_from_checkpoint custom_ops task valid_data""",
    "habana": """
        model_name_or_path dataset_name dataset_config_name per_device_train_batch_size
        per_device_eval_batch_size gradient_accumulation_steps do_train do_eval output_dir
        use_habana use_lazy_mode use_hpu_graphs_for_inference gaudi_config_name
        throughput_warmup_steps config_overrides low_cpu_mem_usage streaming max_steps
        gradient_checkpointing use_cache deepspeed block_size line_by_line pad_to_max_length
        mlm_probability dataset_concatenation lora_rank lora_alpha lora_dropout
        lora_target_modules train_on_inputs learning_rate weight_decay adam_beta1 adam_beta2
        adam_epsilon max_grad_norm num_train_epochs lr_scheduler_type warmup_ratio warmup_steps
        logging_steps save_steps save_strategy save_total_limit seed bf16 fp16 model_type
        tokenizer_name train_file validation_file world_size use_mpi use_deepspeed hostfile""",
    "deepspeed": """
        steps_per_print train_batch_size train_micro_batch_size_per_gpu
        gradient_accumulation_steps bf16.enabled gradient_clipping zero_optimization.stage
        zero_optimization.overlap_comm zero_optimization.reduce_scatter
        zero_optimization.contiguous_gradients zero_optimization.offload_optimizer.device""",
    "accelerate": """
        compute_environment distributed_type mixed_precision num_processes num_machines
        machine_rank main_training_function downcast_bf16 deepspeed_config.zero_stage
        deepspeed_config.gradient_clipping fsdp_config.fsdp_sharding_strategy use_cpu debug""",
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_name_of_theirs_is_accounted_for(name: str) -> None:
    missing = [key for key in KNOWN[name].split() if SYSTEMS[name].rule(key) is None]
    assert missing == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_rules_name_keys_there_are_and_say_why_otherwise(name: str) -> None:
    known = set(all_keys())
    sections = {key.partition(".")[0] for key in known if "." in key}
    names = [rule.theirs for rule in SYSTEMS[name].rules]
    assert len(names) == len(set(names))
    for rule in SYSTEMS[name].rules:
        for key in filter(None, rule.ours.split(", ")):
            assert key in known or (key.endswith(".*") and key[:-2] in sections), rule.theirs
        assert rule.note or rule.ours, rule.theirs


def test_the_pages_are_those_of_the_tables() -> None:
    for name, text in pages().items():
        assert (ROOT / "docs" / "migrate" / name).read_text() == text, "run `make docs`"


def imported(tmp_path: Path, name: str, file: str, text: str) -> tuple[dict, dict[str, dict]]:
    """Our values by dotted key, as they load from the written file, and the lines by key."""
    source, out = tmp_path / file, tmp_path / "ours.yaml"
    source.write_text(text)
    result = penstock.import_config(source, {"from": name, "out": str(out)})
    loaded = load_config(out)
    lines = {line["theirs"]: line for line in result.json()["keys"]}
    assert set(result.values) == set(loaded.origins)
    return dict(result.values), lines


def test_the_tutorials_training_command(tmp_path: Path) -> None:
    text = SYSTEMS["sambanova"].command
    ours, lines = imported(tmp_path, "sambanova", "run.sh", f"SAMBA_SEED=256 {text}")
    assert ours["data.sequence_length"] == 1024
    assert ours["batch.micro"] == 16
    assert ours["optimizer.weight_decay"] == 0.1
    assert ours["optimizer.lr"] == 7.5e-6
    assert ours["optimizer.clip"] == 1.0
    assert ours["schedule.name"] == "constant"
    assert ours["train.steps"] == 800
    assert ours["evaluate.min_accuracy"] == 0.87
    assert ours["model.from"] == "gpt2"
    assert lines["num_tiles"]["kind"] == "none"
    assert lines["learning_rate"]["is_default"]


def test_data_preparation_of_the_tutorial(tmp_path: Path) -> None:
    command = """python -m generative_data_prep pipeline --input_file_path=sst2.jsonl \\
      --output_path=out --pretrained_tokenizer=gpt2 --input_packing_config=single::drop \\
      --max_seq_length=1024 --shuffle on_RAM --dev_ratio 0.1 --disable_space_separator"""
    ours, lines = imported(tmp_path, "sambanova", "prepare.sh", command)
    assert ours["source.path"] == "sst2.jsonl"
    assert ours["source.kind"] == "jsonl"
    assert ours["data.packing"] == "single::drop"
    assert ours["data.shuffle"] is True
    assert ours["source.one_space"] is False
    assert ours["data.splits"] == [0.9, 0.1, 0]
    assert lines["dev_ratio"]["note"]


def test_data_preparation_with_every_boundary_and_category(tmp_path: Path) -> None:
    command = """python -m generative_data_prep pipeline --input_path=a.jsonl --output_path=out \
      --num_training_splits 8 --dev_ratio 0.2 --test_ratio 0.1 --categories_path names.json \
      --attention_boundary prompt_completion_pair --packing_boundary prompt_completion_pair \
      --prompt_prefix "<u>" --prompt_postfix "</u>" --ignore_input_format_error"""
    ours, lines = imported(tmp_path, "sambanova", "prepare.sh", command)
    assert ours["data.splits"] == [0.7, 0.2, 0.1]
    assert (ours["data.files"], ours["data.format"]) == (8, "sambanova")
    assert ours["source.attention_boundary"] == ours["source.packing_boundary"] == "pair"
    assert ours["source.category_key"] == "category"
    assert (ours["source.prompt_prefix"], ours["source.prompt_postfix"]) == ("<u>", "</u>")
    assert ours["source.on_error"] == "skip"
    assert all(line["kind"] != "none" for line in lines.values())


GPT2_SMALL = """
train_input:
    data_processor: "GptHDF5DataProcessor"
    data_dir: "./train_8M_msl2048"
    batch_size: 112
    shuffle: True
    shuffle_seed: 256
    num_workers: 8
eval_input:
    data_processor: "GptHDF5DataProcessor"
    data_dir: "./val_msl2048"
    batch_size: 112
model:
    hidden_size: 768
    vocab_size: 50257
    position_embedding_type: "learned"
    share_embedding_weights: True
    max_position_embeddings: 2048
    num_hidden_layers: 12
    dropout_rate: 0.1
    layer_norm_epsilon: 1.0e-5
    num_heads: 12
    filter_size: 3072
    nonlinearity: "gelu"
    mixed_precision: True
optimizer:
    optimizer_type: "adamw"
    betas: [0.9, 0.95]
    eps: 1e-8
    max_gradient_norm: 1.0
    learning_rate:
      - scheduler: "Linear"
        initial_learning_rate: 0.0
        end_learning_rate: 0.0006
        total_iters: 1600
      - scheduler: "Linear"
        initial_learning_rate: 0.0006
        end_learning_rate: 0.00006
        total_iters: 150000
    weight_decay: 0.01
    initial_loss_scale: 2147483648.0
runconfig:
    max_steps: 151600
    log_steps: 100
    checkpoint_steps: 10000
    seed: 1
    model_dir: "./model_dir"
    eval_steps: 32
"""


def test_cerebras_gpt2_small(tmp_path: Path) -> None:
    ours, lines = imported(tmp_path, "cerebras", "params.yaml", GPT2_SMALL)
    assert {k: v for k, v in ours.items() if k.startswith(("optimizer", "schedule", "batch"))} == {
        "optimizer.name": "adamw",
        "optimizer.betas": [0.9, 0.95],
        "optimizer.eps": 1e-8,
        "optimizer.clip": 1.0,
        "optimizer.lr": 0.0006,
        "optimizer.weight_decay": 0.01,
        "schedule.name": "linear",
        "schedule.warmup": 1600,
        "schedule.min_lr": 0.00006,
        "batch.size": 112,
    }
    assert ours["model.layers"] == 12
    assert ours["precision.compute"] == "bf16"
    assert ours["train.steps"] == 151600
    assert ours["train.evaluate_sequences"] == 32 * 112
    assert not any(line["kind"] == "unknown" for line in lines.values())


def test_graphcore_pretraining(tmp_path: Path) -> None:
    ours, _ = imported(tmp_path, "graphcore", "pretraining.sh", SYSTEMS["graphcore"].command)
    assert ours["plan.layers_per_stage"] == [0, 4, 4, 4]
    assert "plan.stages" not in ours
    assert ours["plan.replicas"] == 4
    assert ours["batch.micro"] == 1
    assert ours["batch.size"] == 1 * 2048 * 4
    assert ours["train.steps"] == 10000 * 8
    assert ours["schedule.warmup"] == 100 * 8
    assert ours["plan.recompute"] == "blocks"
    assert ours["plan.shard"] == "optimizer"
    assert ours["data.path"] == "wiki/*.tfrecord"
    assert ours["optimizer.clip"] is None


def test_habana_fine_tuning(tmp_path: Path) -> None:
    text = """python run_clm.py --model_type gpt2 --tokenizer_name gpt2 --train_file t.txt \\
      --config_overrides "n_embd=1024,n_head=16,n_layer=48,n_positions=1024" --max_steps 100 \\
      --warmup_ratio 0.05 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 \\
      --gradient_checkpointing --use_habana True --bf16 --do_train --output_dir /tmp/out"""
    ours, lines = imported(tmp_path, "habana", "run.txt", text)
    assert ours["model.hidden_size"] == 1024
    assert ours["model.layers"] == 48
    assert ours["train.steps"] == 100
    assert "train.epochs" not in ours
    assert ours["schedule.warmup"] == 5
    assert (ours["batch.micro"], ours["batch.size"]) == (4, 8)
    assert ours["optimizer.betas"] == [0.9, 0.999]
    assert ours["optimizer.lr"] == 5e-5
    assert ours["source.kind"] == "text"
    assert lines["use_habana"]["kind"] == "none"


def test_dropout_rates_keep_their_places(tmp_path: Path) -> None:
    text = "python run_clm.py --config_overrides attn_pdrop=0.1,embd_pdrop=0.2,resid_pdrop=0.3"
    ours, _ = imported(tmp_path, "habana", "run.txt", text)
    names = ("model.attention_dropout", "model.embedding_dropout", "model.dropout")
    assert [ours[name] for name in names] == [0.1, 0.2, 0.3]
    text = "model: {dropout_rate: 0.1, attention_dropout_rate: 0.0}"
    ours, _ = imported(tmp_path, "cerebras", "params.yaml", text)
    assert (ours["model.dropout"], ours["model.attention_dropout"]) == (0.1, 0.0)


def test_graphcores_generated_data(tmp_path: Path) -> None:
    text = "python train_gpt2.py --train-path generated --training-steps 10"
    ours, _ = imported(tmp_path, "graphcore", "run.sh", text)
    assert ours["source.kind"] == "generated"
    assert "data.path" not in ours


def test_habana_adapters(tmp_path: Path) -> None:
    text = """python run_lora_clm.py --model_name_or_path llama --lora_rank 8 --lora_alpha 16
      --lora_dropout 0.05 --lora_target_modules "q_proj" "v_proj" --train_on_inputs False"""
    ours, _ = imported(tmp_path, "habana", "run.txt", text.replace("\n", " "))
    assert ours["lora.rank"] == 8
    assert ours["lora.targets"] == ["q_proj", "v_proj"]
    assert ours["source.prompt_weight"] == 0.0


def test_deepspeed_and_accelerate(tmp_path: Path) -> None:
    ours, _ = imported(tmp_path, "deepspeed", "ds.json", SYSTEMS["deepspeed"].command)
    assert ours == {
        "train.log_every": 64,
        "precision.compute": "bf16",
        "optimizer.clip": 1.0,
        "plan.shard": "gradients",
    }
    ours, _ = imported(tmp_path, "accelerate", "a.yaml", SYSTEMS["accelerate"].command)
    assert ours["plan.replicas"] == 8
    assert ours["plan.shard"] == "gradients"


@pytest.mark.parametrize(
    ("stage", "shard"),
    [(0, "none"), (1, "optimizer"), (2, "gradients"), (3, "weights"), ("auto", None)],
)
def test_deepspeeds_stages_say_what_is_divided(
    stage: object, shard: str | None, tmp_path: Path
) -> None:
    text = json.dumps({"zero_optimization": {"stage": stage}, "train_batch_size": 8})
    ours, _ = imported(tmp_path, "deepspeed", "ds.json", text)
    assert ours.get("plan.shard") == shard
    assert ours["batch.size"] == 8


def test_unknown_keys_get_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "p.yaml"
    source.write_text("model: {hiden_size: 8, hidden_size: 768}\nzzz: 1\n")
    assert main(["import-config", str(source), "--from", "cerebras"]) == 0
    output = capsys.readouterr()
    warnings = [line for line in output.err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "model.hiden_size" in warnings[0]
    assert "did they mean model.hidden_size?" in warnings[0]
    assert "zzz" in warnings[1]
    assert yaml.safe_load(output.out)["model"]["hidden_size"] == 768


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("cerebra", "a.yaml", "model: {hidden_size: 8}", "did you mean cerebras"),
        ("cerebras", "a.yaml", "zzz: 1", "no key of Cerebras"),
        ("cerebras", "a.yaml", "a: [", "is damaged"),
        ("cerebras", "a.json", "[1]", "is damaged"),
        ("cerebras", "a.yaml", "{}", "holds no settings"),
        ("deepspeed", "a.json", json.dumps({"zero_optimization": {"stage": 9}}), "cannot be trans"),
        ("cerebras", "a.yaml", "runconfig: {max_steps: -3}", "train.steps=-3 is wrong"),
        ("graphcore", "a.sh", "train.py --lr-schedule step", "schedule.name=step is wrong"),
    ],
)
def test_mistakes_get_one_line(
    name: str, file: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        penstock.import_config(tmp_path / file, {"from": name})


def test_command_lines_are_read_as_a_shell_does(tmp_path: Path) -> None:
    file = tmp_path / "run.sh"
    file.write_text(
        "#!/bin/bash\n# a comment --x 1\nN=3 python run.py a --one-two 'a b' --list 1 2.5 \\\n"
        "  --on --eq=1e-3 +h.k=true --last no\n"
    )
    assert read_their_config(file) == {
        "one_two": "a b",
        "list": [1, 2.5],
        "on": True,
        "eq": 1e-3,
        "h.k": True,
        "last": "no",
    }
