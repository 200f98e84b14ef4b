"""The plan: how one training step maps to a machine, with predicted memory, FLOPs and time.

`compiler/planner.py` makes one before anything is compiled or allocated; the compiler and the
trainer follow it. It must never import torch, so that planning answers at once.
"""

import dataclasses
from typing import Any

from penstock.compiler.generation import GenerationShapes
from penstock.compiler.layout import DevicePlan
from penstock.compiler.pipeline import Piece, Schedule
from penstock.config.recompute import kept_values
from penstock.console import Console
from penstock.models.architecture import Architecture

_SHOWN = (
    *("flops_per_token", "step_seconds", "tokens_per_second", "micro", "size", "accumulation"),
    *("sequence_length", "compute", "recompute", "loss_chunks", "target", "replicas", "stages"),
    *("schedule", "shard", "tensor", "bubble", "seconds", "limited_by", "measured"),
)
"""Fields that `penstock plan --json` prints as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One step of training, decided. Sizes in sequences and tokens, memory in bytes."""

    architecture: Architecture
    device: str
    compute: str
    """bf16 or fp32: weights and activations."""
    weights: str | None = None
    """int8: the format of blocks' and head's matrices when generating; None: `compute`."""
    micro: int
    size: int
    accumulation: int
    """Micro-batches of one step, on each replica."""
    sequence_length: int
    recompute: str
    loss_chunks: int
    target: str
    memory: dict[str, int]
    """Of the device that needs most."""
    memory_limit_bytes: int
    """Of each device."""
    fits: bool
    flops_per_token: int
    step_seconds: float
    """Predicted time of one optimizer step, or of one token of every text when generating."""
    advice: tuple[str, ...] = ()
    mode: str = "train"
    """train, evaluate or generate. For generating, `micro` is the most texts at once and
    `sequence_length` the longest."""
    replicas: int = 1
    layers_per_stage: tuple[int, ...] = ()
    schedule: str = "1f1b"
    shard: str = "none"
    tensor: int = 1
    """Devices that compute each block together."""
    devices: tuple[DevicePlan, ...] = ()
    """Of one replica, in the order of the stages."""
    pieces: tuple[Piece, ...] = ()
    """The way of a micro-batch through them."""
    bubble: float = 0.0
    """Share of the pipeline's time in which devices wait."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    """The busiest device's step: compute, memory bandwidth, link, waiting."""
    measured: bool = True
    """Whether the target's speeds were measured; else times are lower bounds."""
    attention: str = "full"
    """full, or document: positions see those of their own document alone."""

    @property
    def takes_segments(self) -> bool:
        """Whether blocks are told which positions belong together: documents, or what is text and
        what is padding, where attention would reach it.
        """
        return self.attention == "document" or not self.architecture.is_causal

    @property
    def stages(self) -> int:
        """Devices of one replica."""
        return max(1, len(self.layers_per_stage))

    @property
    def limited_by(self) -> str:
        """What most of the busiest device's time goes to: compute, memory bandwidth or link."""
        work = {name: time for name, time in self.seconds.items() if name != "waiting"}
        return max(work, key=work.__getitem__) if work else "compute"

    @property
    def timeline(self) -> Schedule:
        """The pipeline's schedule, to simulate."""
        return Schedule(self.pieces, self.schedule)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.size * self.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens trained on, or generated."""
        return (self.size if self.mode == "generate" else self.tokens_per_step) / self.step_seconds

    def region_fields(self) -> dict[str, Any]:
        """Exactly what the compiled kernels depend on. Depth is not in it, nor how frozen matrices
        are held, and of recompute only what one block's kernels keep.
        """
        architecture = dataclasses.asdict(self.architecture)
        del architecture["layers"], (architecture["adapter"] or {"base": None})["base"]
        return {
            "architecture": architecture,
            "device": self.device,
            "compute": self.compute,
            **self._weights_field(),
            "micro": self.micro,
            "sequence_length": self.sequence_length,
            "loss_chunks": self.loss_chunks,
            "mode": self.mode,
            "attention": self.attention,
            **({"tensor": self.tensor} if self.tensor > 1 else {}),
            **({"kept": kept_values(self.recompute)} if self.mode == "train" else {}),
        }

    def _weights_field(self) -> dict[str, str]:
        """Only where it says something: other plans' kernels do not depend on it."""
        return {} if self.weights is None else {"weights": self.weights}

    def kernel_fields(self, kernel: str) -> dict[str, Any]:
        """Those of `region_fields` that one kernel's code depends on, so that plans share it."""
        fields = self.region_fields()
        if self.mode == "generate":
            return fields
        region, _, part = kernel.partition("_")
        is_end = region in ("embed", "head")
        left = {"mode", "attention" if region == "head" else "loss_chunks"}
        left |= {"kept", "tensor"} if is_end else {"kept"} if part == "evaluate" else set()
        if is_end:
            fields["architecture"]["adapter"] = self.architecture.adapter is not None
        return {name: value for name, value in fields.items() if name not in left}

    def generation_shapes(self) -> GenerationShapes:
        """Shapes of the kernels that generate text under this plan."""
        return GenerationShapes.of(self.sequence_length, self.micro)

    def overrides(self) -> list[str]:
        """The command line's key=value arguments that lead to these regions."""
        a = self.architecture
        model = {
            "family": a.family,
            "layers": a.layers,
            "hidden_size": a.hidden_size,
            "heads": a.heads,
            "kv_heads": a.heads // a.group_size,
            "mlp_size": a.mlp_size,
            "max_positions": a.max_positions,
            "vocab_size": a.vocab_size,
            "dropout": a.dropout,
            "embedding_dropout": a.embedding_rate,
            "attention_dropout": a.attention_rate,
            "norm_epsilon": a.norm_epsilon,
            "tie_embeddings": a.tie_embeddings,
        }
        if a.positions == "rotary":
            model |= {"rotary_fraction": a.rotary_fraction, "rotary_base": a.rotary_base}
        lora: dict[str, Any] = {}
        if a.adapter is not None:
            lora = {"rank": a.adapter.rank, "alpha": a.adapter.alpha, "dropout": a.adapter.dropout}
            lora["targets"] = f"[{', '.join(site.name for site in a.adapter.sites)}]"
        return [
            *(f"model.{name}={value}" for name, value in model.items()),
            *(f"lora.{name}={value}" for name, value in lora.items()),
            f"mode={self.mode}",
            f"{'generate.batch' if self.mode == 'generate' else 'batch.micro'}={self.micro}",
            f"data.sequence_length={self.sequence_length}",
            f"precision.compute={self.compute}",
            *(f"precision.{name}={value}" for name, value in self._weights_field().items()),
            f"plan.loss_chunks={self.loss_chunks}",
            *([f"plan.tensor={self.tensor}"] if self.tensor > 1 else []),
            *([] if self.attention == "full" else [f"data.attention={self.attention}"]),
            *([f"plan.recompute={self.recompute}"] if self.mode == "train" else []),
            *(["plan.schedule=zero-bubble"] if self.schedule == "zero-bubble" else []),
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return {**dataclasses.asdict(self), "advice": list(self.advice)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Plan":
        """Read what `to_json` wrote; TypeError, KeyError or ValueError when it is not a plan."""
        fields = dict(value)
        fields["architecture"] = Architecture.from_json(value["architecture"])
        fields["memory"] = {str(k): int(v) for k, v in value["memory"].items()}
        fields["advice"] = tuple(str(line) for line in value["advice"])
        fields["layers_per_stage"] = tuple(value.get("layers_per_stage", ()))
        fields["devices"] = tuple(DevicePlan.from_json(d) for d in value.get("devices", ()))
        fields["pieces"] = tuple(Piece(**piece) for piece in value.get("pieces", ()))
        return Plan(**fields)

    def json(self) -> dict[str, Any]:
        """What `penstock plan --json` prints."""
        a = self.architecture
        return {
            "fits": self.fits,
            "memory": self.memory,
            "memory_limit_bytes": self.memory_limit_bytes,
            "parameters": a.parameter_count(),
            "trained_parameters": a.trained_parameters(),
            **{name: getattr(self, name) for name in _SHOWN},
            "layers_per_stage": list(self.layers_per_stage),
            "devices": [dataclasses.asdict(device) for device in self.devices],
            "advice": list(self.advice),
        }

    def facts(self) -> list[tuple[str, str]]:
        """What was decided and predicted, less the memory, as names and values."""
        a = self.architecture
        bound = "" if self.measured else "at least "
        rows = [
            ("model", f"{a.layers} layers × {a.hidden_size} wide, {a.heads} heads"),
            ("vocabulary", f"{a.vocab_size:,} tokens"),
            ("parameters", f"{a.parameter_count():,}{self._trained()}"),
            ("compute", self.compute),
            ("limited by", f"{self.limited_by} ({', '.join(self._shares())})"),
            ("FLOPs", f"{self.flops_per_token / 1e9:,.3f} GFLOP per token"),
        ]
        if self.mode == "generate":
            return [
                *rows,
                ("generating", f"up to {self.size} texts of {self.sequence_length} tokens"),
                ("predicted", f"{bound}{self.step_seconds:.3g} s per token of all texts"),
            ]
        rows += [
            ("recompute", self.recompute),
            ("step", f"{self.size} × {self.sequence_length} tokens"),
            ("micro-batches", f"{self.accumulation} of {self.micro}"),
            ("predicted", f"{bound}{self.step_seconds:.3g} s per step"),
        ]
        if self.replicas > 1:
            rows.append(("replicas", f"{self.replicas}, sharded: {self.shard}"))
        if self.tensor > 1:
            rows.append(("blocks", f"divided among {self.tensor} devices"))
        if self.stages > 1:
            rows.append(("stages", f"{list(self.layers_per_stage)}, {self.schedule}"))
            rows.append(("bubble", f"{self.bubble:.1%} of the devices' time"))
        return rows

    def _trained(self) -> str:
        """How many parameters are trained, where it is not all."""
        a = self.architecture
        return "" if a.adapter is None else f" + {a.trained_parameters():,} trained in adapters"

    def show(self, console: Console) -> None:
        """The plan as two tables and a verdict."""
        rows = [list(row) for row in self.facts()]
        console.table(f"Plan for {self.target}", ["", ""], rows)
        self._show_memory(console)
        limit = f"{self.memory_limit_bytes / 2**30:.3g} GiB"
        verdict = "It fits" if self.fits else "It does NOT fit"
        console.info(f"{verdict} into {limit}{' per device' * (self.stages * self.tensor > 1)}.")
        for line in self.advice:
            console.info(line)

    def _shares(self) -> list[str]:
        """Where the busiest device's step goes, largest first."""
        shares = sorted(self.seconds.items(), key=lambda item: -item[1])
        return [
            f"{name} {time / self.step_seconds:.0%}"
            for name, time in shares
            if time > 0.005 * self.step_seconds
        ]

    def _show_memory(self, console: Console) -> None:
        """By kind on one device; by stage where there are several."""
        if self.stages == 1:
            outside = self.devices[0].outside if self.devices else {}
            sizes = {**self.memory, **{f"{kind}, outside": n for kind, n in outside.items()}}
            rows = [[kind, _mebibytes(size)] for kind, size in sizes.items() if size]
            console.table("Predicted memory", ["kind", "MiB"], rows)
            return
        names = ["stage", "holds", "model", "activations", "other", "total", "outside"]
        rows = [[str(stage), d.holds, *_columns(d)] for stage, d in enumerate(self.devices)]
        console.table("Predicted memory, in MiB", names, rows)


def _columns(device: DevicePlan) -> list[str]:
    """Model state, activations, the rest, the total, and what is outside."""
    memory = device.memory
    model = sum(memory.get(kind, 0) for kind in ("weights", "gradients", "optimizer"))
    rest = memory["total"] - model - memory["activations"]
    outside = sum(device.outside.values())
    sizes = (model, memory["activations"], rest, memory["total"], outside)
    return [_mebibytes(size) for size in sizes]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}"
