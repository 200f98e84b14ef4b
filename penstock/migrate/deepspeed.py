"""DeepSpeed's JSON, as Optimum Habana's and Accelerate's examples use it."""

from typing import Any

from penstock.migrate.rules import System, Values, changed, if_true, maps, none, none_of

_AUTO = "auto"
_LINKS = "how gradients travel is not a setting"


def number(ours: str) -> Any:  # noqa: ANN401 - a converter
    """A value that may be "auto": then the training program decides, and nothing is set."""
    return lambda value, _: {} if value == _AUTO else {ours: value}


def zero_stage(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    """ZeRO's stages as plan.shard."""
    return (
        {}
        if value == _AUTO
        else {"plan.shard": ("none", "optimizer", "gradients", "weights")[int(value)]}
    )


def _betas(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {} if value == _AUTO else {"optimizer.betas": list(value)}


def _schedule(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    name = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
    return {"schedule.name": name[str(value).lower()]}


def _optimizer(value: Any, _: Values) -> Values:  # noqa: ANN401 - any value of a file
    return {
        "optimizer.name": {"adam": "adamw", "adamw": "adamw", "muon": "muon"}[str(value).lower()]
    }


_Z = "zero_optimization"
DEEPSPEED = System(
    name="deepspeed",
    title="DeepSpeed",
    source="DeepSpeed configuration JSON",
    rules=(
        maps("steps_per_print", "train.log_every", number("train.log_every")),
        maps("train_batch_size", "batch.size", number("batch.size")),
        maps("train_micro_batch_size_per_gpu", "batch.micro", number("batch.micro")),
        none("gradient_accumulation_steps", "follows from batch.size, batch.micro and replicas"),
        maps(
            "bf16.enabled",
            "precision.compute",
            lambda v, _: {"precision.compute": "bf16"} if v is True else {},
        ),
        changed(
            "fp16.enabled",
            "precision.compute",
            "bf16: no loss scaling is needed",
            lambda v, _: {"precision.compute": "bf16"} if v is True else {},
        ),
        none("fp16.*", "bf16 needs no loss scaling"),
        maps("gradient_clipping", "optimizer.clip", number("optimizer.clip")),
        changed(
            f"{_Z}.stage",
            "plan.shard",
            "1 optimizer, 2 gradients, 3 weights",
            zero_stage,
        ),
        *none_of(
            f"{_Z}.overlap_comm {_Z}.reduce_scatter {_Z}.contiguous_gradients "
            f"{_Z}.allgather_partitions {_Z}.allgather_bucket_size "
            f"{_Z}.reduce_bucket_size {_Z}.round_robin_gradients",
            _LINKS,
        ),
        none(f"{_Z}.offload_optimizer.*", "state stays on the device; `plan` says whether it fits"),
        none(f"{_Z}.offload_param.*", "weights stay on the device; `plan` says whether they fit"),
        none(f"{_Z}.*", _LINKS),
        maps("optimizer.type", "optimizer.name", _optimizer),
        maps("optimizer.params.lr", "optimizer.lr", number("optimizer.lr")),
        maps("optimizer.params.betas", "optimizer.betas", _betas),
        maps("optimizer.params.eps", "optimizer.eps", number("optimizer.eps")),
        maps(
            "optimizer.params.weight_decay",
            "optimizer.weight_decay",
            number("optimizer.weight_decay"),
        ),
        none("optimizer.params.*", "one implementation"),
        maps("scheduler.type", "schedule.name", _schedule),
        maps("scheduler.params.warmup_num_steps", "schedule.warmup", number("schedule.warmup")),
        maps("scheduler.params.warmup_max_lr", "optimizer.lr", number("optimizer.lr")),
        none("scheduler.params.warmup_min_lr", "the warm-up starts at 0"),
        none("scheduler.params.warmup_type", "the warm-up is linear"),
        none("scheduler.params.total_num_steps", "the decay ends with the run"),
        changed(
            "activation_checkpointing.partition_activations",
            "plan.recompute",
            "blocks",
            if_true("plan.recompute", "blocks"),
        ),
        none("activation_checkpointing.*", "plan.recompute"),
        none("wall_clock_breakdown", "penstock train reports its times"),
        none("zero_allow_untested_optimizer", "plan.shard divides the state of adamw"),
        none("tensorboard.*", "train.tensorboard, on by default"),
    ),
    command="""\
{
  "steps_per_print": 64,
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "gradient_accumulation_steps": "auto",
  "bf16": {"enabled": true},
  "gradient_clipping": 1.0,
  "zero_optimization": {"stage": 2, "overlap_comm": false, "reduce_scatter": false,
                        "contiguous_gradients": false}
}""",
    ours="penstock import-config ds_config.json --from deepspeed out=job.yaml",
    notes=(
        '"auto" is left to the rest of the configuration.',
        "The processes are started by `penstock train --processes N`; see docs/parallel.md.",
        "Its stages 1 to 3 are plan.shard, by torch's own FSDP2; add plan.engine=deepspeed to have "
        "DeepSpeed's engine take them, where it is installed (extra `deepspeed`).",
    ),
)
