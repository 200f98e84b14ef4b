"""What a pipeline's devices do when: micro-batches through stages, event by event.

The planner takes step time, bubble and peaks from it, `report/plan_page.py` draws it. It knows
durations and orders, nothing of models, machines or torch.

Schedules: GPipe (Huang et al., arXiv 1811.06965, §2.3), 1F1B (Narayanan et al., arXiv 2104.04473,
§2.2.1), its interleaved form (the same, §2.2.2), and zero-bubble, of which the memory is 1F1B's
(ZB-H1: Qi et al., arXiv 2401.10241, §2.2).
"""

import collections
import dataclasses
import functools
import heapq
import itertools
from collections.abc import Sequence

_EXACT_MICRO_BATCHES, _EXACT_PASSES = 16, 200
"""Micro-batches per position that are simulated one by one, fewer of them in long pipelines;
beyond, time goes on as it did in the second half, which the tests hold against whole
simulations."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One position on a micro-batch's way: a stage, a part of one, or a head that stands apart."""

    device: int
    forward: float
    """Seconds."""
    backward: float
    """Without `weight`."""
    is_head: bool = False
    """Whether it stands apart from its device's blocks, at the end of the way."""
    weight: float = 0.0
    """Gradients of weights, where the schedule has them apart."""

    def time(self, direction: int) -> float:
        """Seconds of a pass: forward 0, backward 1, gradients of weights 2."""
        return (self.forward, self.backward, self.weight)[direction]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A device's time on one micro-batch, in one direction."""

    device: int
    piece: int
    micro_batch: int
    is_forward: bool
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """All of a step but the update."""

    slots: tuple[Slot, ...]
    seconds: float
    under_way: tuple[int, ...]
    """Most micro-batches between forward and backward at once, by piece."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Pieces in the order a micro-batch visits them, and the rule devices choose by."""

    pieces: tuple[Piece, ...]
    name: str
    """1f1b, gpipe, interleaved or zero-bubble."""

    @functools.cached_property
    def devices(self) -> int:
        """Devices the pieces are on."""
        return 1 + max(piece.device for piece in self.pieces)

    def seconds(self, micro_batches: int) -> float:
        """Time of so many micro-batches."""
        length = len(self.pieces)
        exact = length * max(4, min(_EXACT_MICRO_BATCHES, _EXACT_PASSES // length))
        half = -(-exact // (2 * self.devices)) * self.devices
        if micro_batches <= 2 * half:
            return self.simulate(micro_batches).seconds
        # Interleaved devices take pieces in turns of as many micro-batches as there are devices.
        rest = micro_batches % self.devices
        first, second = (self.simulate(n * half + rest).seconds for n in (1, 2))
        return second + (second - first) * (micro_batches - 2 * half - rest) / half

    @property
    def work(self) -> float:
        """All devices' time for one micro-batch, without waiting."""
        return sum(piece.time(direction) for piece in self.pieces for direction in range(3))

    def blocks(self, device: int) -> list[int]:
        """A device's pieces, less a head that stands apart."""
        return [i for i, p in enumerate(self.pieces) if p.device == device and not p.is_head]

    def ahead(self, device: int, micro_batches: int) -> int:
        """Forward passes of a device before its first backward; at its peak one more waits."""
        pieces, behind = len(self.blocks(device)), self.devices - device - 1
        if self.name == "gpipe":
            return pieces * micro_batches
        heads = sum(piece.is_head for piece in self.pieces)
        if pieces == 1:
            return behind + heads
        return 2 * behind + (pieces - 1) * self.devices + heads

    def most_under_way(self, device: int, micro_batches: int) -> int:
        """Forward passes that wait for their backward at a device's peak, over its pieces."""
        passes = len(self.blocks(device)) * micro_batches
        waiting = self.ahead(device, micro_batches) + 1 + self.most_apart(device, micro_batches)
        return min(passes, waiting)

    def most_apart(self, device: int, micro_batches: int) -> int:
        """Those of them whose input's gradient is computed, and of weights not yet."""
        return min(device, micro_batches - 1) if self.name == "zero-bubble" else 0

    def simulate(self, micro_batches: int) -> Timeline:
        """Every device's slots, micro-batch by micro-batch."""
        return _Simulation(self, micro_batches).run()


class _Simulation:
    """The state of all devices while time goes on."""

    def __init__(self, schedule: Schedule, micro_batches: int) -> None:
        self.schedule, self.pieces = schedule, schedule.pieces
        self.count = micro_batches
        size = len(self.pieces)
        self.arrived = [[micro_batches if i == 0 else 0, 0, 0] for i in range(size)]
        """By piece: micro-batches whose input, and whose gradient, is there; or has been used."""
        self.started = [[0, 0, 0] for _ in range(size)]
        self.finished = [0] * size
        """By piece: backward passes done."""
        self.peak = [0] * size
        self.busy = [False] * schedule.devices
        self.ends: list[tuple[float, int, int]] = []
        """When slots under way end: (time, piece, direction)."""
        self.slots: list[Slot] = []
        devices = range(schedule.devices)
        self.orders = [self._order(device) for device in devices]
        self.heads = [
            [i for i, piece in enumerate(self.pieces) if piece.is_head and piece.device == device]
            for device in devices
        ]

    def run(self) -> Timeline:
        """Let slots end, and start what can start then, until there is none."""
        now = 0.0
        for device in range(self.schedule.devices):
            self._start(device, now)
        while self.ends:
            now = self.ends[0][0]
            concerned: set[int] = set()
            while self.ends and self.ends[0][0] == now:
                _, piece, direction = heapq.heappop(self.ends)
                concerned |= self._finish(piece, direction)
            for device in sorted(concerned):
                self._start(device, now)
        return Timeline(tuple(self.slots), now, tuple(self.peak))

    def _finish(self, piece: int, direction: int) -> set[int]:
        """A slot ends: its device is free, and the next piece has its input. Returns both's
        devices, which may go on.
        """
        device = self.pieces[piece].device
        self.busy[device] = False
        if direction == 2:
            return {device}
        self.finished[piece] += direction
        self.arrived[piece][2] += direction
        after = piece + (-1 if direction else 1)
        if after < 0:
            return {device}
        if after == len(self.pieces):
            self.arrived[piece][1] += 1
            return {device}
        self.arrived[after][direction] += 1
        return {device, self.pieces[after].device}

    def _start(self, device: int, now: float) -> None:
        """Let a free device take up what it does next."""
        choice = None if self.busy[device] else self._choose(device)
        if choice is None:
            return
        piece, direction = choice
        end = now + self.pieces[piece].time(direction)
        micro_batch = self.started[piece][direction]
        self.slots.append(Slot(device, piece, micro_batch, direction == 0, now, end))
        self.started[piece][direction] += 1
        self.peak[piece] = max(self.peak[piece], self.started[piece][0] - self.finished[piece])
        self.busy[device] = True
        heapq.heappush(self.ends, (end, piece, direction))

    def _choose(self, device: int) -> tuple[int, int] | None:
        """The piece and direction a free device takes up next; None: it waits.

        A head that stands apart goes first, else the next pass of the device's fixed order.
        """
        for piece in self.heads[device]:
            for direction in (1, 0):
                if self._is_ready(piece, direction):
                    return piece, direction
        order = self.orders[device]
        if not order or not self._is_ready(*order[0]):
            return None
        return order.popleft()

    def _is_ready(self, piece: int, direction: int) -> bool:
        """Whether the input of its next pass is there."""
        return self.arrived[piece][direction] > self.started[piece][direction]

    def _order(self, device: int) -> collections.deque[tuple[int, int]]:
        """Passes of a device's blocks: forward ones until its first backward can be there, then
        one of each in turn. Pieces take turns after as many micro-batches as there are devices.
        """
        blocks = self.schedule.blocks(device)
        devices, passes = self.schedule.devices, len(blocks) * self.count
        turns = [k % (devices * len(blocks)) // devices for k in range(passes)]
        forward = [(blocks[turn], 0) for turn in turns]
        backward = [(blocks[-1 - turn], 1) for turn in turns]
        ahead = min(passes, self.schedule.ahead(device, self.count))
        order = collections.deque(forward[:ahead])
        # Gradients of weights wait for as many backward passes as the device is from the first.
        apart = self.schedule.name == "zero-bubble"
        weights = [None] * device + [(piece, 2) for piece, _ in backward] if apart else []
        for turn in itertools.zip_longest(forward[ahead:], backward, weights):
            order.extend(item for item in turn if item is not None)
        return order


def pieces_per_stage(schedule: str, stages: int) -> int:
    """Pieces of the depth that a schedule puts on each of so many devices."""
    return 2 if schedule == "interleaved" and stages > 1 else 1


def pieces_of(
    forward: Sequence[float],
    backward: Sequence[float],
    *,
    devices: int,
    head: tuple[float, float] | None,
    schedule: str = "1f1b",
) -> tuple[Piece, ...]:
    """Pieces dealt to devices in turn; a head that stands apart is the first device's.

    Where the schedule has gradients of weights apart they are half of a backward pass, as they are
    of a matrix product's, and all of the first piece's, which nobody waits for.
    """
    pieces: list[Piece] = []
    for index, (f, b) in enumerate(zip(forward, backward, strict=True)):
        apart = 0.0 if schedule != "zero-bubble" else b if index == 0 else b / 2
        pieces.append(Piece(index % devices, f, b - apart, weight=apart))
    if head is not None:
        pieces.append(Piece(0, *head, is_head=True))
    return tuple(pieces)
