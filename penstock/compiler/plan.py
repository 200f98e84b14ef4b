"""The plan: how one training step maps to a machine, with predicted memory, FLOPs and time.

`api` makes one before anything is compiled or allocated; the compiler and the trainer follow it.
It must never import torch, so that planning answers at once.
"""

import dataclasses
from typing import Any

from penstock.compiler.memory import ELEMENT_BYTES, step_memory
from penstock.config.schema import BatchSection, PlanSection
from penstock.console import Console
from penstock.errors import ConfigError
from penstock.hardware.target import Target
from penstock.models.architecture import Architecture

_CHUNK_BYTES = 64 << 20
"""Largest piece of float32 logits the loss works on at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One step of training, decided. Sizes in sequences and tokens, memory in bytes."""

    architecture: Architecture
    device: str
    compute: str
    """bf16 or fp32: weights and activations."""
    micro: int
    size: int
    accumulation: int
    sequence_length: int
    recompute: str
    loss_chunks: int
    target: str
    memory: dict[str, int]
    memory_limit_bytes: int
    fits: bool
    flops_per_token: int
    step_seconds: float
    """Predicted time of one optimizer step."""
    advice: tuple[str, ...] = ()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.size * self.sequence_length

    def region_fields(self) -> dict[str, Any]:
        """Exactly what the compiled kernels depend on. Depth and recompute are not in it."""
        architecture = dataclasses.asdict(self.architecture)
        del architecture["layers"]
        return {
            "architecture": architecture,
            "device": self.device,
            "compute": self.compute,
            "micro": self.micro,
            "sequence_length": self.sequence_length,
            "loss_chunks": self.loss_chunks,
        }

    def overrides(self) -> list[str]:
        """The command line's key=value arguments that lead to these regions."""
        a = self.architecture
        model = {
            "layers": a.layers,
            "hidden_size": a.hidden_size,
            "heads": a.heads,
            "mlp_size": a.mlp_size,
            "max_positions": a.max_positions,
            "vocab_size": a.vocab_size,
            "dropout": a.dropout,
        }
        return [f"model.{name}={value}" for name, value in model.items()] + [
            f"batch.micro={self.micro}",
            f"data.sequence_length={self.sequence_length}",
            f"precision.compute={self.compute}",
            f"plan.loss_chunks={self.loss_chunks}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return {**dataclasses.asdict(self), "advice": list(self.advice)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Plan":
        """Read what `to_json` wrote; TypeError, KeyError or ValueError when it is not a plan."""
        fields = dict(value)
        fields["architecture"] = Architecture(**value["architecture"])
        fields["memory"] = {str(k): int(v) for k, v in value["memory"].items()}
        fields["advice"] = tuple(str(line) for line in value["advice"])
        return Plan(**fields)

    def json(self) -> dict[str, Any]:
        """What `penstock plan --json` prints."""
        a = self.architecture
        return {
            "fits": self.fits,
            "memory": self.memory,
            "memory_limit_bytes": self.memory_limit_bytes,
            "parameters": a.parameter_count(),
            "flops_per_token": self.flops_per_token,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_step / self.step_seconds,
            **{
                name: getattr(self, name)
                for name in ("micro", "size", "accumulation", "sequence_length", "compute")
            },
            **{name: getattr(self, name) for name in ("recompute", "loss_chunks", "target")},
            "advice": list(self.advice),
        }

    def show(self, console: Console) -> None:
        """The plan as two tables and a verdict."""
        a = self.architecture
        console.table(
            f"Plan for {self.target}",
            ["", ""],
            [
                ["model", f"{a.layers} layers × {a.hidden_size} wide, {a.heads} heads"],
                ["vocabulary", f"{a.vocab_size:,} tokens"],
                ["parameters", f"{a.parameter_count():,}"],
                ["compute", self.compute],
                ["step", f"{self.size} × {self.sequence_length} tokens"],
                ["micro-batches", f"{self.accumulation} of {self.micro}"],
                ["training FLOPs", f"{self.flops_per_token / 1e9:,.3f} GFLOP per token"],
                ["predicted", f"{self.step_seconds:.2f} s per step"],
            ],
        )
        console.table(
            "Predicted memory",
            ["kind", "MiB"],
            [[kind, f"{size / 2**20:,.0f}"] for kind, size in self.memory.items()],
        )
        limit = f"{self.memory_limit_bytes / 2**30:.1f} GiB"
        console.info("It fits" if self.fits else "It does NOT fit" + f" into {limit}.")
        for line in self.advice:
            console.info(line)


def make_plan(
    architecture: Architecture,
    *,
    batch: BatchSection,
    plan: PlanSection,
    compute: str | None,
    sequence_length: int,
    target: Target,
) -> Plan:
    """Decide how to train `architecture` on `target`.

    `compute` None takes bf16 where the target is fast at it.

    Raises:
        ConfigError: shapes that contradict each other.
    """
    _check_shapes(architecture, batch, sequence_length)
    compute = compute or ("bf16" if target.fast_bf16 else "fp32")
    size = batch.size or batch.micro
    rows = batch.micro * sequence_length
    chunks = plan.loss_chunks or min(rows, _loss_chunks(architecture, rows))
    accumulation = size // batch.micro
    memory = step_memory(
        architecture,
        micro=batch.micro,
        sequence_length=sequence_length,
        accumulation=accumulation,
        compute=compute,
        recompute=plan.recompute,
        loss_chunks=chunks,
        device=target.device,
    )
    flops = architecture.flops_per_token(sequence_length)
    fits = memory["total"] <= target.memory_bytes
    return Plan(
        architecture=architecture,
        device=target.device,
        compute=compute,
        micro=batch.micro,
        size=size,
        accumulation=accumulation,
        sequence_length=sequence_length,
        recompute=plan.recompute,
        loss_chunks=chunks,
        target=target.name,
        memory=memory,
        memory_limit_bytes=target.memory_bytes,
        fits=fits,
        flops_per_token=flops,
        step_seconds=_step_seconds(
            architecture, size * sequence_length, flops, compute, plan, target
        ),
        advice=() if fits else _advice(batch, plan),
    )


def _check_shapes(architecture: Architecture, batch: BatchSection, sequence_length: int) -> None:
    """Refuse what cannot be, naming the key."""
    if sequence_length > architecture.max_positions:
        raise ConfigError(
            f"data.sequence_length={sequence_length} is longer than the model's "
            f"{architecture.max_positions} positions",
            where="data.sequence_length",
            do=f"use at most {architecture.max_positions}, or raise model.max_positions",
        )
    if batch.size is not None and batch.size % batch.micro:
        raise ConfigError(
            f"batch.size={batch.size} is not a multiple of batch.micro={batch.micro}",
            where="batch.size",
            do=f"use {-(-batch.size // batch.micro) * batch.micro}",
        )


def _loss_chunks(architecture: Architecture, rows: int) -> int:
    """Fewest equal pieces of rows whose float32 logits stay under `_CHUNK_BYTES`."""
    largest = max(1, _CHUNK_BYTES // (4 * architecture.padded_vocab_size))
    return -(-rows // largest)


def _step_seconds(
    architecture: Architecture,
    tokens: int,
    flops: int,
    compute: str,
    plan: PlanSection,
    target: Target,
) -> float:
    """Roofline: matrix products at the measured peak, plus traffic at the memory's bandwidth.

    Per token and layer about 30 activations of the width cross memory forward and backward; per
    step the optimizer reads and writes about 28 bytes per parameter.
    """
    element = ELEMENT_BYTES[compute]
    extra = 4 / 3 if plan.recompute == "blocks" else 1.0
    compute_seconds = tokens * flops * extra / target.peak(compute)
    a = architecture
    activations = 30 * a.layers * tokens * a.hidden_size * element * extra
    activations += 10 * tokens * a.padded_vocab_size
    optimizer = 28 * a.parameter_count(padded=True)
    return compute_seconds + (activations + optimizer) / target.bandwidth_bytes_per_second


def _advice(batch: BatchSection, plan: PlanSection) -> tuple[str, ...]:
    """What would need less memory."""
    lines: list[str] = []
    if plan.recompute == "none":
        lines.append("plan.recompute=blocks keeps far fewer activations, for a third more time.")
    if batch.micro > 1:
        lines.append(
            f"batch.micro={batch.micro // 2} batch.size={batch.size or batch.micro} "
            "gives the same steps in smaller pieces."
        )
    return tuple(lines) or ("Choose a smaller model or a shorter data.sequence_length.",)
