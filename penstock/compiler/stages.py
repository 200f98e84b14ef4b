"""Which blocks each pipeline stage holds: as the user says, or found by dynamic programming.

The planner calls it with what each stage would cost. It knows counts of blocks and two functions,
nothing of models, machines or torch.

The first stage holds the embedding, the last one the head. With `tied` stages are counted as
Graphcore's GPT-2 does, whose head has the embedding's weights and is the first device's
(micro-batches then return to it).
"""

import bisect
from collections.abc import Callable, Sequence

from penstock.errors import ConfigError

Measure = Callable[[int, int], float]
"""Cost of a stage by its index and its number of blocks."""


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
    table = [[(seconds(s, n), memory(s, n)) for n in counts] for s in range(stages)]
    fewest = [0 if _may_be_empty(s, stages, tied=tied) else 1 for s in range(stages)]
    limits = sorted({time for costs in table for time, _ in costs})

    def placed(limit: float) -> tuple[float, tuple[int, ...]] | None:
        return _least_memory(layers, table, fewest, limit)

    def first(is_enough: Callable[[tuple[float, tuple[int, ...]] | None], bool]) -> int:
        """The fastest of `limits` that is enough; slower ones are too. Bisection."""
        return bisect.bisect_left(limits, True, key=lambda limit: is_enough(placed(limit)))

    at = first(lambda found: found is not None and found[0] <= memory_limit)
    best = placed(limits[at]) if at < len(limits) else placed(limits[-1])
    if best is None:
        raise AssertionError("there is a place for every block when stages have no limit")
    return best[1]


def _least_memory(
    layers: int,
    table: Sequence[Sequence[tuple[float, float]]],
    fewest: Sequence[int],
    limit: float,
) -> tuple[float, tuple[int, ...]] | None:
    """(memory of the fullest stage, placement) with no stage slower than `limit`.

    Dynamic programming from the last stage to the first: best[n] is the least memory of the
    fullest of the stages so far with n blocks, and the blocks of the foremost of them.
    """
    steps: list[dict[int, tuple[float, int]]] = []
    after: dict[int, tuple[float, int]] = {0: (0.0, 0)}
    for costs, least in zip(reversed(table), reversed(fewest), strict=True):
        best: dict[int, tuple[float, int]] = {}
        for count in range(least, len(costs)):
            time, size = costs[count]
            if time > limit:
                break
            for behind, (fullest, _) in after.items():
                total = behind + count
                value = max(size, fullest)
                if total <= layers and (total not in best or value < best[total][0]):
                    best[total] = (value, count)
        steps.append(best)
        after = best
    if layers not in after:
        return None
    placement: list[int] = []
    for best in reversed(steps):
        count = best[layers - sum(placement)][1]
        placement.append(count)
    return after[layers][0], tuple(placement)


def _may_be_empty(index: int, stages: int, *, tied: bool) -> bool:
    """Whether a stage has a region besides blocks: the first, and the last with its own head."""
    return stages > 1 and (index == 0 or (index == stages - 1 and not tied))


def _last_index(values: Sequence[int], value: int, start: int) -> int:
    """Last place of `value` from `start` on."""
    return max(i for i in range(start, len(values)) if values[i] == value)
