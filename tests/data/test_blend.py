"""Proportions of a mixture: exact at every moment, and a function of the position alone."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data.blend import LONGEST_PERIOD, Blend, History, shares_of
from penstock.errors import CheckpointError

WEIGHTS = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any)


def named(weights: list[int]) -> dict[str, Fraction]:
    return {f"m{i}": Fraction(weight) for i, weight in enumerate(weights)}


@settings(deadline=None)
@given(weights=WEIGHTS)
def test_no_member_is_ever_a_whole_sample_ahead_or_behind(weights: list[int]) -> None:
    blend = Blend(named(weights))
    members, numbers = blend.locate(np.arange(3 * sum(weights)))
    drawn = np.zeros(len(weights), np.int64)
    for place, (member, number) in enumerate(zip(members, numbers, strict=True)):
        assert number == drawn[member]  # each sample of a member once, in order
        drawn[member] += 1
        for weight, count in zip(weights, drawn, strict=True):
            # Whole numbers: |count - n·weight/total| < 1.
            assert abs(count * sum(weights) - (place + 1) * weight) < sum(weights)
        assert list(blend.counts(place + 1).values()) == drawn.tolist()


def test_weights_are_kept_exactly_as_they_are_written() -> None:
    assert shares_of([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]) == [7, 2, 1]
    assert shares_of([Fraction("1/3"), Fraction("2/3")]) == [1, 2]
    assert shares_of([Fraction(5), Fraction(0)]) == [1, 0]


def test_weights_of_no_common_denominator_are_rounded_and_say_so() -> None:
    weights = {"a": Fraction(1_000_003), "b": Fraction(999_983), "c": Fraction(1)}
    blend = Blend(weights)
    assert blend.is_rounded
    assert sum(blend.shares) == LONGEST_PERIOD
    for share, weight in zip(blend.shares, weights.values(), strict=True):
        assert share >= 1
        assert abs(share / LONGEST_PERIOD - float(weight / sum(weights.values()))) < 2e-5
    assert not Blend(named([3, 2])).is_rounded


@settings(deadline=None)
@given(first=WEIGHTS, second=WEIGHTS, change=st.integers(1, 100))
def test_changed_weights_leave_what_was_drawn_and_hold_from_there(
    first: list[int], second: list[int], change: int
) -> None:
    before = History([]).then(0, named(first))
    after = before.then(change, named(second))
    assert [after.locate(p) for p in range(change)] == [before.locate(p) for p in range(change)]
    seen: dict[str, int] = {}
    for position in range(change + 50):
        name, number = after.locate(position)
        assert number == seen.get(name, 0)  # nothing twice, nothing left out
        seen[name] = number + 1
    assert {n: c for n, c in after.counts(change + 50).items() if c} == seen
    total = sum(second)
    if len(after.segments) == 1:  # no change: what follows need not start anew
        return
    for i, weight in enumerate(second):
        new = seen.get(f"m{i}", 0) - before.counts(change).get(f"m{i}", 0)
        assert abs(new * total - 50 * weight) < total


def test_the_same_weights_in_other_numbers_are_no_change() -> None:
    history = History([]).then(0, named([1, 3]))
    assert history.then(70, named([2, 6])).segments == history.segments
    assert len(history.then(70, named([2, 5])).segments) == 2


def test_a_history_comes_back_from_a_checkpoint() -> None:
    history = History([]).then(0, named([1, 3])).then(9, {"new": Fraction("0.3")})
    assert History.from_json(history.json()).segments == history.segments
    for damaged in ("x", [{"start": 0}], [{"start": 0, "weights": [["a", "one"]]}], None):
        with pytest.raises(CheckpointError, match="mixture is damaged"):
            History.from_json(damaged)


def test_a_position_far_out_is_found_at_once() -> None:
    history = History([]).then(0, named([7, 2, 1]))
    position = 10**15 + 3
    name, number = history.locate(position)
    assert history.counts(position)[name] == number
