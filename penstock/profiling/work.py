"""FLOPs and bytes of each region, from the model's shape: what measured times are set against.

`profiling/session.py` asks for a step's. Pure arithmetic on the planner's own cost model; it must
never import torch.
"""

import dataclasses
from collections.abc import Sequence

from penstock.compiler.activations import part_parameters
from penstock.compiler.cost import CostModel, Seconds
from penstock.compiler.plan import Plan
from penstock.compiler.sizes import ELEMENT_BYTES
from penstock.hardware.target import Target
from penstock.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Work:
    """What a region does in one step."""

    flops: float
    """Floating-point operations of its matrix products."""
    bytes: float
    """Least that crosses memory: weights, gradients and the activations the planner counts."""

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclasses.dataclass(frozen=True)
class Held:
    """What a process has of a model."""

    layers: int
    has_embedding: bool
    has_head: bool
    parameters: int
    """That it updates: its own, and of divided ones its rows."""


def training_work(plan: Plan, *, compiled: bool, held: Held | None = None) -> dict[str, Work]:
    """Work of one optimizer step by region, in a process that has `held`; None: the whole model."""
    a, element = plan.architecture, ELEMENT_BYTES[plan.compute]
    held = held or Held(a.layers, True, True, a.parameter_count(padded=True))
    # On a machine of one FLOP and one byte a second, seconds are FLOPs and bytes.
    unit = Target("unit", plan.device, 1, {plan.compute: 1.0}, 1.0, fast_bf16=True)
    model = CostModel(
        architecture=a,
        target=unit,
        micro=plan.micro,
        sequence_length=plan.sequence_length,
        compute=plan.compute,
        recompute=plan.recompute,
        tensor=plan.tensor,
        compiled=compiled,
    )
    block, head, embedding = model.block(), model.head(), model.embedding()
    weights = part_parameters(a, plan.tensor) * element
    table = a.padded_vocab_size * a.hidden_size * element
    found = {
        "block forward": _work(block[0], weights, held.layers),
        "block backward": _work(block[1], 2 * weights, held.layers),
    }
    if held.has_embedding:
        found["embedding forward"] = _work(embedding[0], 0)
        # The gradient of the whole table is written, whatever few rows are not zero.
        found["embedding backward"] = _work(embedding[1], table)
    if held.has_head:
        found["head, forward and backward"] = _work(head[0] + head[1], 3 * table)
    found = {
        name: Work(work.flops * plan.accumulation, work.bytes * plan.accumulation)
        for name, work in found.items()
    }
    found["optimizer"] = _work(model.update(held.parameters), 0)
    found["gradient norm"] = Work(2.0 * held.parameters, float(held.parameters * element))
    return found


def generation_work(
    a: Architecture, compute: str, passes: Sequence[tuple[int, int, int]]
) -> dict[str, Work]:
    """Work of `passes`, each (rows, new positions, cached positions before), by region."""
    element = ELEMENT_BYTES[compute]
    found: dict[str, Work] = {}
    for rows, count, start in passes:
        end = start + count
        products = 2 * a.block_parameters() + 4 * a.hidden_size * end
        cache = 2 * a.kv_size * rows * end * element
        name = "block prefill" if count > 1 else "block decode"
        block = Work(
            a.layers * rows * count * products,
            a.layers * (a.block_parameters() * element + cache),
        )
        table = a.padded_vocab_size * a.hidden_size
        head = Work(2 * rows * table, table * element)
        for region, work in ((name, block), ("head", head)):
            before = found.get(region, Work(0, 0))
            found[region] = Work(before.flops + work.flops, before.bytes + work.bytes)
    return found


def _work(unit_seconds: Seconds, weights: float, times: int = 1) -> Work:
    return Work(times * unit_seconds.compute, times * (unit_seconds.bandwidth + weights))
