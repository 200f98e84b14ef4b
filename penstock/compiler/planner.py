"""Decides a plan: what the user asks for, checked, laid out and measured against a target.

`jobs.py` calls it before anything is compiled or allocated. It must never import torch, so that
planning answers at once.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from penstock.compiler.cost import CostModel
from penstock.compiler.demands import check_length, check_shapes, require_stages, with_devices
from penstock.compiler.generation_memory import generation_memory
from penstock.compiler.layout import DevicePlan, Layout, Layouter
from penstock.compiler.memory import MemoryModel
from penstock.compiler.operators import fits_attention
from penstock.compiler.plan import Plan
from penstock.compiler.search import advise
from penstock.compiler.sizes import ELEMENT_BYTES
from penstock.config.planning import PlanSection
from penstock.config.recompute import default_policy
from penstock.config.schema import BatchSection
from penstock.hardware.target import Target
from penstock.models.architecture import Architecture
from penstock.models.parameters import Frozen

_EAGER_PIECE_BYTES = 64 << 20
"""Largest piece of float32 logits the loss works on at a time without kernels."""
_PIECE_BYTES = 256 << 20
"""The same with kernels, in the compute format. One piece is fastest, and needs no sums."""
_PIECE_SHARE = 32
"""At most this part of a device's memory is one piece of the logits."""


def make_plan(
    architecture: Architecture,
    *,
    batch: BatchSection,
    plan: PlanSection,
    compute: str | None,
    sequence_length: int,
    target: Target,
    optimizer: str = "adamw",
    saves: bool = False,
    resumes: bool = False,
    compiled: bool = True,
    frozen: Frozen | None = None,
    attention: str = "full",
) -> Plan:
    """Decide how to train `architecture` on `target`.

    `compute` None takes bf16 where the target is fast at it. A plan that does not fit says so, and
    what would.

    Args:
        architecture: the model.
        batch: as the user gave it.
        plan: as the user gave it.
        compute: bf16 or fp32.
        sequence_length: tokens per sequence.
        target: the machine.
        optimizer: its name, for its state.
        saves: whether checkpoints are saved while training goes on.
        resumes: whether training starts from one.
        compiled: whether regions run as kernels where they can; on CUDA they cannot so far.
        frozen: what is not trained.
        attention: full or document; see `Plan.attention`.

    Raises:
        ConfigError: shapes that contradict each other.
    """
    deciding = _Deciding(
        architecture=architecture,
        compute=compute,
        sequence_length=sequence_length,
        target=target,
        optimizer=optimizer,
        saves=saves,
        resumes=resumes,
        compiled=compiled and target.device != "cuda",
        frozen=frozen or Frozen(),
    )
    recompute = plan.recompute or default_policy(deciding.compiled)
    plan = plan.model_copy(update={"recompute": recompute})
    decided = deciding.decide(batch, plan, thorough=True)
    decided = dataclasses.replace(decided, attention=attention)
    return decided if decided.fits else _with_advice(deciding, decided, batch, plan)


def _with_advice(
    deciding: "_Deciding", decided: Plan, batch: BatchSection, plan: PlanSection
) -> Plan:
    """A plan that does not fit, and what would."""
    advice = advise(
        deciding.decide,
        batch,
        plan,
        size=decided.size,
        chunks=decided.loss_chunks,
        devices=deciding.target.devices,
    )
    return dataclasses.replace(decided, advice=advice)


def make_generation_plan(
    architecture: Architecture,
    *,
    batch: int,
    compute: str | None,
    weights: str | None = None,
    capacity: int,
    target: Target,
) -> Plan:
    """Decide how to generate up to `batch` texts of up to `capacity` tokens at once, from weights
    in the format `weights` (int8), or in that of `compute`.

    Raises:
        ConfigError: texts longer than the model's positions.
    """
    check_length(architecture, capacity)
    architecture = architecture.for_generation()
    compute = compute or ("bf16" if target.fast_bf16 else "fp32")
    memory = generation_memory(
        architecture,
        rows=batch,
        capacity=capacity,
        compute=compute,
        weights=weights,
        device=target.device,
    )
    # Every token reads all matrices and, at worst, all of the cache.
    read = memory["weights"] + memory["cache"]
    seconds = {
        "compute": 2 * batch * architecture.parameter_count() / target.peak(compute),
        "memory bandwidth": read / target.bandwidth_bytes_per_second,
    }
    return Plan(
        mode="generate",
        architecture=architecture,
        device=target.device,
        compute=compute,
        weights=weights,
        micro=batch,
        size=batch,
        accumulation=1,
        sequence_length=capacity,
        recompute="none",
        loss_chunks=1,
        target=target.name,
        memory=memory,
        memory_limit_bytes=target.memory_bytes,
        fits=memory["total"] <= target.memory_bytes,
        flops_per_token=architecture.flops_per_token(capacity) // 3,
        step_seconds=max(seconds.values()),
        layers_per_stage=(architecture.layers,),
        devices=(DevicePlan(architecture.layers, True, True, memory, {}),),
        seconds=seconds,
        measured=target.is_expected,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Deciding:
    """What stays the same for every plan that is tried."""

    architecture: Architecture
    compute: str | None
    sequence_length: int
    target: Target
    optimizer: str
    saves: bool
    resumes: bool
    compiled: bool
    frozen: Frozen

    def decide(self, batch: BatchSection, plan: PlanSection, *, thorough: bool = False) -> Plan:
        """One plan, whether it fits or not; `thorough` also tries other orders of the stages."""
        check_shapes(self.architecture, batch, plan, self.sequence_length)
        size = batch.size or batch.micro * plan.replicas * (plan.micro_batches or 1)
        accumulation = size // (batch.micro * plan.replicas)
        stages = require_stages(self.architecture, plan, accumulation, self.target.device)
        target = with_devices(self.target, stages, plan.replicas, plan.tensor)
        layouter = Layouter(
            cost=CostModel(**self._common(batch, plan), target=target, stages=stages),
            memory=self._memory(batch, plan, accumulation),
            schedule=plan.schedule,
            stages=stages,
        )
        found = tuple(plan.layers_per_stage or layouter.find(target.memory_bytes))
        if thorough and plan.layers_per_stage is None:
            found = layouter.improve(found)
        return _plan(layouter, layouter.lay_out(found), target, size, timed=thorough)

    def _common(self, batch: BatchSection, plan: PlanSection) -> dict[str, Any]:
        """What costs and memory both depend on."""
        return {
            "architecture": self.architecture,
            "micro": batch.micro,
            "sequence_length": self.sequence_length,
            "compute": self._format,
            "recompute": plan.recompute,
            "compiled": self.compiled,
            "own": self._calls_own,
            "replicas": plan.replicas,
            "shard": plan.shard,
            "tensor": plan.tensor,
        }

    @property
    def _calls_own(self) -> bool:
        """Whether kernels call operators of our own."""
        a, can = self.architecture, self.target.own_operators and self.compiled
        fits = fits_attention(self._format, a.head_size, self.sequence_length)
        return can and fits and a.attention_rate == 0

    def _memory(self, batch: BatchSection, plan: PlanSection, accumulation: int) -> MemoryModel:
        rows = batch.micro * self.sequence_length
        return MemoryModel(
            **self._common(batch, plan),
            accumulation=accumulation,
            loss_chunks=min(rows, plan.loss_chunks or self._loss_chunks(rows)),
            device=self.target.device,
            optimizer=self.optimizer,
            saves=self.saves,
            resumes=self.resumes,
            streams=self.target.streams,
            own_products=self.target.own_products and self._format == "bf16",
            frozen=self.frozen,
            sums=self.target.sums,
        )

    def _loss_chunks(self, rows: int) -> int:
        """Fewest equal pieces of rows whose logits are small enough; a generic model's one."""
        if self.architecture.generic is not None:
            return 1
        limit, element = _EAGER_PIECE_BYTES, 4
        if self.compiled:
            limit = min(_PIECE_BYTES, self.target.memory_bytes // _PIECE_SHARE)
            element = ELEMENT_BYTES[self._format]
        largest = max(1, limit // (element * self.architecture.padded_vocab_size))
        return -(-rows // largest)

    @property
    def _format(self) -> str:
        return self.compute or ("bf16" if self.target.fast_bf16 else "fp32")


def _plan(layouter: Layouter, layout: Layout, target: Target, size: int, *, timed: bool) -> Plan:
    """Everything decided, as one record; not `timed`, a plan that does not fit takes for ever."""
    memory, cost = layouter.memory, layouter.cost
    spent, fits = layout.spent, _fits(layout.devices, target)
    step_seconds = layout.step_seconds if timed or fits else math.inf
    return Plan(
        architecture=cost.architecture,
        device=target.device,
        compute=cost.compute,
        micro=cost.micro,
        size=size,
        accumulation=memory.accumulation,
        sequence_length=cost.sequence_length,
        recompute=cost.recompute,
        loss_chunks=memory.loss_chunks,
        target=target.name,
        memory=layout.fullest.memory,
        memory_limit_bytes=target.memory_bytes,
        fits=fits,
        # Frozen weights are multiplied by forward and backward, and have no gradient.
        flops_per_token=cost.architecture.flops_per_token(cost.sequence_length)
        - 2 * (memory.frozen.blocks + memory.frozen.head),
        step_seconds=step_seconds,
        replicas=cost.replicas,
        layers_per_stage=layout.layers_per_stage,
        schedule=layouter.schedule,
        shard=cost.shard,
        tensor=cost.tensor,
        devices=layout.devices,
        pieces=layout.schedule.pieces,
        bubble=layout.bubble if timed else 0.0,
        seconds={
            "compute": spent.compute,
            "memory bandwidth": spent.bandwidth,
            "link": spent.link,
            "waiting": max(0.0, step_seconds - spent.total),
        },
        measured=target.is_expected,
    )


def _fits(devices: Sequence[DevicePlan], target: Target) -> bool:
    """Whether every device has the memory, and what streams has its own."""
    return all(
        device.memory["total"] <= target.memory_bytes
        and sum(device.outside[kind] for kind in target.streams) <= target.streaming_memory_bytes
        for device in devices
    )
