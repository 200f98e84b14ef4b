"""A model laid out on devices: each one's blocks, memory and time, and the step they make.

`compiler/plan.py` makes one for what the user asks, `compiler/search.py` many. It must never
import torch.
"""

import dataclasses
import functools
from typing import Any

from penstock.compiler.cost import CostModel, Seconds
from penstock.compiler.demands import head_stands_apart
from penstock.compiler.memory import MemoryModel
from penstock.compiler.pipeline import Piece, Schedule, pieces_of, pieces_per_stage
from penstock.compiler.stages import place

_ROTATIONS = 16
"""Orders of the stages that are tried."""


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """One device of a replica: a stage of the pipeline, or the whole model."""

    layers: int
    """Blocks."""
    embedding: bool
    head: bool
    memory: dict[str, int]
    """Bytes by kind at the peak, with the total."""
    outside: dict[str, int]
    """Bytes in streaming memory, or in the host's where the device has its own."""

    @property
    def holds(self) -> str:
        """In words."""
        parts = ["embedding"] * self.embedding
        parts += [f"{self.layers} block{'s' * (self.layers != 1)}"] * (self.layers > 0)
        return ", ".join(parts + ["head"] * self.head)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "DevicePlan":
        """Read what `dataclasses.asdict` made."""
        return DevicePlan(**value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay a model out, with what it costs."""

    layers_per_stage: tuple[int, ...]
    devices: tuple[DevicePlan, ...]
    schedule: Schedule
    micro_batches: int
    spent: Seconds
    """The busiest device's time in one step."""
    update_seconds: float
    """After the last micro-batch: gradients summed over replicas, parameters updated."""

    @property
    def fullest(self) -> DevicePlan:
        """The device that needs most memory."""
        return max(self.devices, key=lambda device: device.memory["total"])

    @functools.cached_property
    def pipeline_seconds(self) -> float:
        """From the first forward to the last backward; simulated when it is first asked for."""
        return self.schedule.seconds(self.micro_batches)

    @property
    def step_seconds(self) -> float:
        """One optimizer step."""
        return self.pipeline_seconds + self.update_seconds

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time in which devices wait."""
        if len(self.devices) == 1:
            return 0.0
        work = self.micro_batches * self.schedule.work
        return max(0.0, 1 - work / (len(self.devices) * self.pipeline_seconds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layouter:
    """Lays a model out by its costs; the same costs serve every placement."""

    cost: CostModel
    memory: MemoryModel
    schedule: str
    stages: int

    @property
    def layers(self) -> int:
        """Blocks to place."""
        return self.cost.architecture.layers

    @property
    def tied(self) -> bool:
        """Whether the head stands apart, on the first device."""
        return head_stands_apart(self.cost.architecture, self.cost.target.device, self.stages)

    def find(self, memory_limit: int) -> tuple[int, ...]:
        """The fastest placement that fits, or the one that needs least."""
        return place(
            self.layers,
            self.stages,
            tied=self.tied,
            seconds=lambda stage, count: self._busy(stage, count).total,
            memory=lambda stage, count: self.device(stage, count).memory["total"],
            memory_limit=memory_limit,
        )

    def improve(self, placement: tuple[int, ...]) -> tuple[int, ...]:
        """The same numbers of blocks in the order with the least waiting, if no fuller a device.

        The slowest stage alone does not say how long filling and draining a pipeline takes; the
        first stage keeps its place, the others are rotated.
        """
        first, *others = placement
        turns = range(0, len(others), max(1, len(others) // _ROTATIONS))
        rotated = {placement, *((first, *others[n:], *others[:n]) for n in turns)}
        if len(rotated) == 1:
            return placement
        count = min(self.memory.accumulation, 2 * (self.stages + 1))
        count -= count % self.stages if self.schedule in ("interleaved", "zero-bubble") else 0

        def fullest(layers: tuple[int, ...]) -> int:
            return max(self.device(s, n).memory["total"] for s, n in enumerate(layers))

        def seconds(layers: tuple[int, ...]) -> float:
            return Schedule(self._pieces(layers), self.schedule).simulate(count).seconds

        limit = fullest(placement)
        allowed = [layers for layers in sorted(rotated) if fullest(layers) <= limit]
        return min(allowed, key=lambda layers: (seconds(layers), layers != placement))

    def lay_out(self, layers_per_stage: tuple[int, ...]) -> Layout:
        """Everything about one placement."""
        count = self.memory.accumulation
        numbered = list(enumerate(layers_per_stage))
        devices = tuple(self.device(stage, layers) for stage, layers in numbered)
        updates = [self._update(stage, layers) for stage, layers in numbered]
        busy = [
            self._busy(stage, layers) * count + update
            for (stage, layers), update in zip(numbered, updates, strict=True)
        ]
        return Layout(
            layers_per_stage=layers_per_stage,
            devices=devices,
            schedule=Schedule(self._pieces(layers_per_stage), self.schedule),
            micro_batches=count,
            spent=max(busy, key=lambda seconds: seconds.total),
            update_seconds=max(update.total for update in updates),
        )

    def device(self, stage: int, layers: int) -> DevicePlan:
        """A device's regions and memory."""
        embedding, head = self._ends(stage)
        found = self.memory.stage(
            layers,
            embedding=embedding,
            head=head,
            block_passes=self._block_passes(stage, layers),
            weight_passes=self._waiting[stage] * layers,
        )
        return DevicePlan(layers, embedding, head, found.device, found.outside)

    def _ends(self, stage: int) -> tuple[bool, bool]:
        """Whether a stage has the embedding, and the head."""
        return stage == 0, stage == (0 if self.tied else self.stages - 1)

    def _block_passes(self, stage: int, layers: int) -> int:
        """Forward passes of single blocks that wait for their backward at a stage's peak."""
        return self._passes[stage] * -(-layers // self._parts)

    @property
    def _parts(self) -> int:
        """Pieces of the depth on each device."""
        return pieces_per_stage(self.schedule, self.stages)

    @functools.cached_property
    def _block_seconds(self) -> tuple[Seconds, Seconds]:
        """Asked of the costs once: placements by the thousand are looked at."""
        return self.cost.block()

    @functools.cached_property
    def _passes(self) -> tuple[int, ...]:
        """Forward passes of its pieces that wait at each stage's peak."""
        schedule, count = self._empty_schedule, self.memory.accumulation
        return tuple(schedule.most_under_way(stage, count) for stage in range(self.stages))

    @functools.cached_property
    def _waiting(self) -> tuple[int, ...]:
        """Passes of each stage that wait only for the gradients of weights."""
        schedule, count = self._empty_schedule, self.memory.accumulation
        return tuple(schedule.most_apart(stage, count) for stage in range(self.stages))

    @functools.cached_property
    def _empty_schedule(self) -> Schedule:
        """The schedule, whose order does not depend on times."""
        none = [0.0] * (self.stages * self._parts)
        head = (0.0, 0.0) if self.tied else None
        return Schedule(pieces_of(none, none, devices=self.stages, head=head), self.schedule)

    def _busy(self, stage: int, layers: int) -> Seconds:
        """A device's time on one micro-batch, with what it sends."""
        forward, backward = self._stage_seconds(stage, layers, part=0, parts=1)
        total = forward + backward
        if self.tied and stage == 0:
            for seconds in self._head_seconds():
                total += seconds
        return total

    def _pieces(self, layers_per_stage: tuple[int, ...]) -> tuple[Piece, ...]:
        """The way of a micro-batch through the devices."""
        ways = [
            self._stage_seconds(stage, layers, part=part, parts=self._parts)
            for part in range(self._parts)
            for stage, layers in enumerate(layers_per_stage)
        ]
        head = None
        if self.tied:
            forward, backward = self._head_seconds()
            head = (forward.total, backward.total)
        return pieces_of(
            [forward.total for forward, _ in ways],
            [backward.total for _, backward in ways],
            devices=self.stages,
            head=head,
            schedule=self.schedule,
        )

    def _head_seconds(self) -> tuple[Seconds, Seconds]:
        """A head that stands apart; it sends its gradient back."""
        forward, backward = self.cost.head()
        return forward, backward + self.cost.boundary()

    def _stage_seconds(
        self, stage: int, layers: int, *, part: int, parts: int
    ) -> tuple[Seconds, Seconds]:
        """Forward and backward of one part of a stage's blocks, and of the regions beside them."""
        mine = layers // parts + (layers % parts > part)
        forward, backward = (seconds * mine for seconds in self._block_seconds)
        is_first, is_last = stage == 0 and part == 0, stage == self.stages - 1 and part == parts - 1
        if is_first:
            first, second = self.cost.embedding()
            forward, backward = forward + first, backward + second
        if is_last and not self.tied:
            first, second = self.cost.head()
            forward, backward = forward + first, backward + second
        if self.stages > 1:
            sent = self.cost.boundary()
            forward = forward if is_last and not self.tied else forward + sent
            backward = backward if is_first else backward + sent
        return forward, backward

    def _update(self, stage: int, layers: int) -> Seconds:
        embedding, head = self._ends(stage)
        return self.cost.update(self.memory.trained(layers, embedding=embedding, head=head))
