"""A plan that fits, when the one asked for does not: what to set, and what it would cost.

`compiler/plan.py` asks it for advice. It knows which keys may change without changing what is
learned (the sequences of a step stay the same), nothing of how plans are made.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from penstock.config.planning import PlanSection
from penstock.config.schema import BatchSection
from penstock.errors import ConfigError

_PIECES_MORE = 4
"""Factor of loss chunks that is tried."""
_POLICIES_TRIED = ("selective", "every-4", "every-2", "blocks")
"""Of recomputing, besides the one asked for; each needs less memory and more time."""
_MICRO_TRIED = 6
"""Sizes of micro-batches that are tried, halving from the one asked for."""


class Candidate(Protocol):
    """What the search reads of a plan."""

    @property
    def fits(self) -> bool:
        """Whether every device has the memory."""
        ...

    @property
    def step_seconds(self) -> float:
        """Predicted time of one step."""
        ...

    @property
    def memory(self) -> dict[str, int]:
        """Of the fullest device, with the total."""
        ...

    @property
    def loss_chunks(self) -> int:
        """Pieces of the loss."""
        ...


Make = Callable[[BatchSection, PlanSection], Candidate]


@dataclasses.dataclass(frozen=True)
class Change:
    """A variant of the sections, by what differs."""

    batch: BatchSection
    plan: PlanSection
    keys: tuple[str, ...]
    """As key=value, for the command line."""


def advise(
    make: Make, batch: BatchSection, plan: PlanSection, *, size: int, chunks: int, devices: int
) -> tuple[str, ...]:
    """What to set so that the plan fits, or that nothing tried does.

    First with the devices asked for, then with as few more as will do; of those that fit the one
    with the shortest step.

    Args:
        make: decides a plan; ConfigError where the variant cannot be.
        batch: as the user gave it.
        plan: as the user gave it.
        size: sequences of one step, to be kept.
        chunks: pieces of the loss in the plan that does not fit.
        devices: how many the target has.
    """
    tried: list[tuple[Candidate, Change]] = []
    for number, (stages, replicas) in enumerate(_device_counts(plan, devices)):
        changes = list(_changes(batch, plan, size, chunks, stages, replicas))
        found = _made(make, _smallest(changes))
        if number == 0 or any(made.fits for made, _ in found):
            found = _made(make, changes)
        tried += found
        fitting = [(made, change) for made, change in found if made.fits]
        if fitting:
            made, change = min(fitting, key=lambda pair: (pair[0].step_seconds, len(pair[1].keys)))
            return (
                f"{' '.join(change.keys)} fits: {_size(made)} and {made.step_seconds:.3g} s per "
                f"step, the fastest of the {len(fitting)} that fit of {len(tried)} tried.",
            )
    if not tried:
        return ("Choose a smaller model or a shorter data.sequence_length.",)
    made, change = min(tried, key=lambda pair: pair[0].memory["total"])
    return (
        f"None of {len(tried)} plans tried fits; {' '.join(change.keys)} needs least, "
        f"{_size(made)}. Choose a smaller model or a shorter data.sequence_length.",
    )


def _made(make: Make, changes: Iterable[Change]) -> list[tuple[Candidate, Change]]:
    """The plans of these changes that can be."""
    found: list[tuple[Candidate, Change]] = []
    for change in changes:
        with contextlib.suppress(ConfigError):
            found.append((make(change.batch, change.plan), change))
    return found


def _smallest(changes: Sequence[Change]) -> list[Change]:
    """Those that need least memory: if none of them fits, none does.

    Smallest or largest micro-batches: fewer of them need no sums of gradients.
    """
    if not changes:
        return []
    shard = changes[-1].plan.shard
    sizes = {min(c.batch.micro for c in changes), max(c.batch.micro for c in changes)}
    return [
        c
        for c in changes
        if c.plan.recompute == "blocks" and c.plan.shard == shard and c.batch.micro in sizes
    ]


def _size(made: Candidate) -> str:
    return f"{made.memory['total'] / 2**30:.2f} GiB"


def _device_counts(plan: PlanSection, devices: int) -> Iterator[tuple[int, int]]:
    """(stages, replicas): as asked for, then by powers of two, fewest devices first."""
    asked = (len(plan.layers_per_stage or ()) or plan.stages or 1, plan.replicas)
    yield asked
    powers = [1 << n for n in range(devices.bit_length())]
    more = [
        pair
        for pair in itertools.product(powers, powers)
        if asked[0] * asked[1] < pair[0] * pair[1] <= devices // plan.tensor and pair[1] >= asked[1]
    ]
    yield from sorted(more, key=lambda pair: (pair[0] * pair[1], pair[0]))


def _changes(
    batch: BatchSection, plan: PlanSection, size: int, chunks: int, stages: int, replicas: int
) -> Iterator[Change]:
    """Every variant with so many devices, the sequences of a step kept."""
    halves = [batch.micro >> n for n in range(_MICRO_TRIED) if batch.micro >> n]
    shards = ("none", "optimizer", "gradients", "weights") if replicas > 1 else ("none",)
    policies = dict.fromkeys((plan.recompute, *_POLICIES_TRIED))
    for micro, recompute, more, shard in itertools.product(
        halves, policies, (1, _PIECES_MORE), shards
    ):
        if size % (micro * replicas):
            continue
        values: dict[str, Any] = {"recompute": recompute, "shard": shard, "replicas": replicas}
        if more > 1:
            values["loss_chunks"] = chunks * more
        asked = len(plan.layers_per_stage or ()) or plan.stages or 1
        if stages != asked:
            values.update(stages=stages, layers_per_stage=None)
        yield _change(batch, plan, micro, size, values)
        if stages == asked and plan.layers_per_stage is not None and stages > 1:
            free = {**values, "stages": stages, "layers_per_stage": None}
            yield _change(batch, plan, micro, size, free)


def _change(
    batch: BatchSection, plan: PlanSection, micro: int, size: int, values: dict[str, Any]
) -> Change:
    """One variant, and the keys that lead to it."""
    keys = list(
        _keys("batch", batch, {"micro": micro, "size": size} if micro != batch.micro else {})
    )
    keys += _keys("plan", plan, values)
    return Change(
        batch.model_copy(update={"micro": micro, "size": size}),
        plan.model_copy(update=values),
        tuple(keys),
    )


def _keys(section: str, before: Any, values: dict[str, Any]) -> Iterable[str]:  # noqa: ANN401 - either section
    """key=value of what differs from the section."""
    for name, value in values.items():
        if getattr(before, name) != value:
            yield f"{section}.{name}={'null' if value is None else value}"
