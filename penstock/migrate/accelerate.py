"""Accelerate's YAML (`accelerate config`)."""

from typing import Any

from penstock.migrate.deepspeed import number, zero_stage
from penstock.migrate.rules import System, Values, changed, maps, none, none_of

_LAUNCH = "describes how processes are started"
_PLUGIN = "deepspeed_config"


def _precision(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {
        "precision.compute": {"no": "fp32", "bf16": "bf16", "fp16": "bf16"}[
            str(value).lower().replace("false", "no")
        ]
    }


def _sharding(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    names = {
        "1": "weights",
        "full_shard": "weights",
        "hybrid_shard": "weights",
        "4": "weights",
        "2": "gradients",
        "shard_grad_op": "gradients",
        "3": "none",
        "no_shard": "none",
    }
    return {"plan.shard": names[str(value).lower()]}


ACCELERATE = System(
    name="accelerate",
    title="Accelerate",
    source="huggingface/accelerate (commands/config)",
    rules=(
        maps("num_processes", "plan.replicas", lambda v, _: {"plan.replicas": v} if v > 0 else {}),
        changed("mixed_precision", "precision.compute", "fp16 is bf16 here", _precision),
        maps("use_cpu", "device", lambda v, _: {"device": "cpu"} if v else {}),
        none("distributed_type", "plan.replicas and plan.shard say it"),
        none("compute_environment", _LAUNCH),
        *none_of(
            "machine_rank num_machines gpu_ids main_process_ip main_process_port rdzv_backend "
            "same_network main_training_function enable_cpu_affinity debug downcast_bf16 tpu_name "
            "tpu_zone tpu_env tpu_vm tpu_use_cluster tpu_use_sudo command_file commands",
            _LAUNCH,
        ),
        *none_of("mpirun_config.* mpirun_config", _LAUNCH),
        maps(f"{_PLUGIN}.gradient_clipping", "optimizer.clip", number("optimizer.clip")),
        none(f"{_PLUGIN}.gradient_accumulation_steps", "follows from batch.size and batch.micro"),
        changed(
            f"{_PLUGIN}.zero_stage", "plan.shard", "1 optimizer, 2 gradients, 3 weights", zero_stage
        ),
        none(f"{_PLUGIN}.deepspeed_config_file", "import that file with --from deepspeed"),
        none(f"{_PLUGIN}.*", "state and weights stay on the device"),
        none(_PLUGIN, "empty"),
        changed(
            "fsdp_config.fsdp_sharding_strategy",
            "plan.shard",
            "hybrid is weights over all replicas",
            _sharding,
        ),
        changed(
            "fsdp_config.fsdp_activation_checkpointing",
            "plan.recompute",
            "blocks",
            lambda v, _: {"plan.recompute": "blocks"} if v else {},
        ),
        none("fsdp_config.*", "sharding has no further settings"),
        none("fsdp_config", "empty"),
        maps("megatron_lm_config.megatron_lm_pp_degree", "plan.stages"),
        maps("megatron_lm_config.megatron_lm_gradient_clipping", "optimizer.clip"),
        maps("megatron_lm_config.megatron_lm_tp_degree", "plan.tensor"),
        none("megatron_lm_config.*", "how Megatron-LM computes it"),
        *none_of("dynamo_config.* dynamo_config", "regions are compiled ahead: penstock compile"),
        *none_of("fp8_config.* fp8_config", "compute is bf16 or float32"),
        *none_of("parallelism_config.* parallelism_config", "plan.* says it"),
    ),
    command="""\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
mixed_precision: bf16
num_processes: 8
deepspeed_config:
  zero_stage: 2
  gradient_clipping: 1.0""",
    ours="penstock import-config default_config.yaml --from accelerate out=job.yaml",
    notes=("The processes are started by `penstock train --processes N`; see docs/parallel.md.",),
)
