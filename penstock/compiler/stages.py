"""Which blocks each pipeline stage holds: as the user says, or found by dynamic programming.

The planner calls it with what each stage would cost. It knows counts of blocks and two functions,
nothing of models, machines or torch.

The first stage holds the embedding, the last one the head. With `tied` stages are counted as
Graphcore's GPT-2 does, whose head has the embedding's weights and is the first device's
(micro-batches then return to it).
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence

from penstock.errors import ConfigError

Measure = Callable[[int, int], float]
"""Cost of a stage by its index and its number of blocks, never less for more of them."""


def check_layers_per_stage(
    given: Sequence[int], layers: int, stages: int | None, *, tied: bool
) -> None:
    """Refuse a list that does not place every block once, naming the nearest list that does.

    Raises:
        ConfigError: wrong sum, an empty stage, or another number of stages than asked for.
    """
    key, shown = "plan.layers_per_stage", list(given)
    if stages is not None and stages != len(given):
        raise ConfigError(
            f"{key}={shown} has {len(given)} stages, plan.stages={stages}",
            where=key,
            do="give one of the two",
        )
    check_stages(len(given), layers, key)
    do = f"give {layers} blocks to the stages, such as {nearest(given, layers, tied=tied)}"
    if sum(given) != layers:
        raise ConfigError(
            f"{key}={shown} places {sum(given)} blocks, the model has {layers}", where=key, do=do
        )
    for index, count in enumerate(given):
        if count == 0 and not _may_be_empty(index, len(given), tied=tied):
            raise ConfigError(
                f"{key}={shown} leaves stage {index} with nothing to do", where=key, do=do
            )


def check_stages(stages: int, layers: int, key: str = "plan.stages") -> None:
    """Refuse more stages than there are blocks."""
    if stages > layers:
        raise ConfigError(
            f"{stages} stages are more than the model's {layers} blocks",
            where=key,
            do=f"use at most {layers} stages",
        )


def nearest(given: Sequence[int], layers: int, *, tied: bool) -> list[int]:
    """The list of as many stages nearest to `given` that places every block once."""
    stages = len(given)
    fewest = [0 if _may_be_empty(i, stages, tied=tied) else 1 for i in range(stages)]
    counts = [max(least, count) for least, count in zip(fewest, given, strict=True)]
    while sum(counts) < layers:
        counts[_last_index(counts, min(counts[1:] or counts), 1 if stages > 1 else 0)] += 1
    while sum(counts) > layers:
        spare = [
            count if count > least else -1 for count, least in zip(counts, fewest, strict=True)
        ]
        counts[_last_index(spare, max(spare), 0)] -= 1
    return counts


def place(
    layers: int,
    stages: int,
    *,
    tied: bool,
    seconds: Measure,
    memory: Measure,
    memory_limit: float,
) -> tuple[int, ...]:
    """Blocks of each stage: the slowest stage as fast as can be while the fullest one fits.

    Of placements with equally fast slowest stages, one with the least memory on its fullest; of
    those the one with fewest blocks in the first stages, which hold more micro-batches at once.
    Where nothing fits, the placement that needs least memory.
    """
    if stages == 1:
        return (layers,)
    counts = range(layers - (stages - 1) + 2)
    room = _Room(
        layers,
        fewest=[0 if _may_be_empty(s, stages, tied=tied) else 1 for s in range(stages)],
        seconds=[[seconds(s, n) for n in counts] for s in range(stages)],
        memory=[[memory(s, n) for n in counts] for s in range(stages)],
    )
    slowest = room.least(room.seconds, lambda limit: room.most(limit, memory_limit))
    if slowest is None:
        slowest = math.inf
    fullest = room.least(room.memory, lambda limit: room.most(slowest, limit))
    if fullest is None:
        raise AssertionError("there is a place for every block when stages have no limit")
    return _least_memory(room, room.most(slowest, fullest))


@dataclasses.dataclass(frozen=True)
class _Room:
    """How many blocks stages take within limits; a stage with more blocks needs no less of
    anything.
    """

    layers: int
    fewest: Sequence[int]
    """Blocks, by stage."""
    seconds: Sequence[Sequence[float]]
    """By stage, then by number of blocks."""
    memory: Sequence[Sequence[float]]

    def most(self, seconds: float, memory: float) -> list[int]:
        """Blocks each stage takes within both limits; fewer than its fewest where it has no room
        even for those.
        """
        return [
            min(bisect.bisect_right(times, seconds), bisect.bisect_right(sizes, memory)) - 1
            for times, sizes in zip(self.seconds, self.memory, strict=True)
        ]

    def least(
        self, costs: Sequence[Sequence[float]], most: Callable[[float], list[int]]
    ) -> float | None:
        """The least of these costs that, as a limit, leaves room for every block, by bisection."""
        limits = sorted({cost for stage in costs for cost in stage})
        at = bisect.bisect_left(limits, True, key=lambda limit: self._holds(most(limit)))
        return limits[at] if at < len(limits) else None

    def _holds(self, most: Sequence[int]) -> bool:
        has_fewest = all(n >= few for n, few in zip(most, self.fewest, strict=True))
        return has_fewest and sum(most) >= self.layers


def _least_memory(room: _Room, most: Sequence[int]) -> tuple[int, ...]:
    """The placement with the least memory on its fullest stage, of those with at most so many
    blocks on each.

    Dynamic programming from the last stage to the first: best[n] is the least memory of the
    fullest of the stages so far with n blocks, and the blocks of the foremost of them.
    """
    steps: list[dict[int, tuple[float, int]]] = []
    after: dict[int, tuple[float, int]] = {0: (0.0, 0)}
    for stage in reversed(range(len(most))):
        # The stages before it take so many at most: fewer behind them lead nowhere.
        behind_least = room.layers - sum(most[:stage])
        best: dict[int, tuple[float, int]] = {}
        for count in range(room.fewest[stage], most[stage] + 1):
            size = room.memory[stage][count]
            for behind, (fullest, _) in after.items():
                total = behind + count
                value = max(size, fullest)
                if behind_least <= total <= room.layers and (
                    total not in best or value < best[total][0]
                ):
                    best[total] = (value, count)
        steps.append(best)
        after = best
    placement: list[int] = []
    for best in reversed(steps):
        placement.append(best[room.layers - sum(placement)][1])
    return tuple(placement)


def _may_be_empty(index: int, stages: int, *, tied: bool) -> bool:
    """Whether a stage has a region besides blocks: the first, and the last with its own head."""
    return stages > 1 and (index == 0 or (index == stages - 1 and not tied))


def _last_index(values: Sequence[int], value: int, start: int) -> int:
    """Last place of `value` from `start` on."""
    return max(i for i in range(start, len(values)) if values[i] == value)
