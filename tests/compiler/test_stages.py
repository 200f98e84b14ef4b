"""Placement of blocks: dynamic programming against every placement there is, and bad lists."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.compiler.stages import check_layers_per_stage, check_stages, nearest, place
from penstock.errors import ConfigError


def every(layers: int, stages: int, *, tied: bool) -> Iterator[tuple[int, ...]]:
    """Every placement that gives each stage something to do."""
    for counts in itertools.product(range(layers + 1), repeat=stages):
        inner = counts[1:] if tied else counts[1:-1]
        if sum(counts) == layers and all(inner) and (stages > 1 or layers):
            yield counts


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_no_placement_is_better(data: st.DataObject) -> None:
    stages = data.draw(st.integers(2, 4))
    layers = data.draw(st.integers(stages, 7))
    tied = data.draw(st.booleans())
    extra = data.draw(st.lists(st.integers(0, 9), min_size=stages, max_size=stages))
    weight = data.draw(st.lists(st.integers(1, 5), min_size=stages, max_size=stages))
    limit = data.draw(st.integers(5, 40))

    def seconds(stage: int, count: int) -> float:
        return extra[stage] + 3 * count

    def memory(stage: int, count: int) -> float:
        return weight[stage] * count + (4 if stage == 0 else 0)

    found = place(layers, stages, tied=tied, seconds=seconds, memory=memory, memory_limit=limit)

    def rank(counts: tuple[int, ...]) -> tuple[bool, float, float]:
        slowest = max(seconds(s, n) for s, n in enumerate(counts))
        fullest = max(memory(s, n) for s, n in enumerate(counts))
        return (False, slowest, fullest) if fullest <= limit else (True, fullest, 0)

    options = list(every(layers, stages, tied=tied))
    assert found in options
    assert rank(found) == min(rank(counts) for counts in options)


def test_one_stage_holds_everything() -> None:
    assert place(
        5, 1, tied=True, seconds=lambda s, n: n, memory=lambda s, n: n, memory_limit=0
    ) == (5,)


@pytest.mark.parametrize(
    ("given_list", "layers", "stages", "message"),
    [
        ([0, 4, 4], 12, None, "places 8 blocks, the model has 12 .*such as \\[0, 6, 6\\]"),
        ([0, 5, 5, 5], 12, None, "places 15 blocks.*such as \\[0, 4, 4, 4\\]"),
        ([6, 0, 6], 12, None, "leaves stage 1 with nothing to do.*such as"),
        ([6, 6, 0], 12, None, "leaves stage 2 with nothing to do"),
        ([0, 6, 6], 12, 4, "has 3 stages, plan.stages=4 .*: give one of the two"),
        ([1, 1, 1], 2, None, "3 stages are more than the model's 2 blocks .*: use at most 2"),
        ([0], 12, None, "places 0 blocks"),
    ],
)
def test_lists_that_do_not_place_every_block_once_are_refused(
    given_list: list[int], layers: int, stages: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_layers_per_stage(given_list, layers, stages, tied=True)
    assert "(plan.layers_per_stage)" in str(caught.value)


def test_lists_that_place_every_block_pass() -> None:
    check_layers_per_stage([0, 4, 4, 4], 12, None, tied=True)
    check_layers_per_stage([0, 4, 4, 4], 12, 4, tied=True)
    check_layers_per_stage([12], 12, None, tied=False)
    # A head of its own is something to do.
    check_layers_per_stage([6, 6, 0], 12, None, tied=False)


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"13 stages are more than .* \(plan.stages\): use at"):
        check_stages(13, 12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(6, 30), st.booleans())
def test_the_list_an_error_proposes_is_accepted(
    given_list: list[int], layers: int, tied: bool
) -> None:
    check_layers_per_stage(nearest(given_list, layers, tied=tied), layers, None, tied=tied)
