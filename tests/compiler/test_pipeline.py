"""Pipelines, event by event: the closed forms of the papers, and rules no schedule may break."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.compiler.pipeline import Piece, Schedule, Timeline, pieces_of


def even(stages: int, name: str, *, parts: int = 1) -> Schedule:
    """Stages of one second forward and two backward, in equal parts."""
    count = stages * parts
    forward, backward = [1 / parts] * count, [2 / parts] * count
    return Schedule(pieces_of(forward, backward, devices=stages, head=None), name)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_even_stages_take_the_time_of_the_closed_forms(stages: int, rounds: int) -> None:
    count = stages * rounds
    # Megatron-LM (arXiv 2104.04473, §2.2): a bubble of (p - 1)/v passes beside m passes of work.
    for name, parts in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2 if stages > 1 else 1)):
        timeline = even(stages, name, parts=parts).simulate(count)
        assert timeline.seconds == pytest.approx(3 * (count + (stages - 1) / parts))


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_gradients_of_weights_fill_the_bubble(stages: int) -> None:
    # Qi et al., arXiv 2401.10241, table 1: ZB-H1 waits (p - 1)(F + B - W), 1F1B (p - 1)(F + B + W).
    pieces = tuple(Piece(stage, 1.0, 1.0, weight=1.0) for stage in range(stages))
    count = 3 * stages
    assert Schedule(pieces, "zero-bubble").simulate(count).seconds == 3 * count + stages - 1
    assert even(stages, "1f1b").simulate(count).seconds == 3 * count + 3 * (stages - 1)


def test_one_device_never_waits() -> None:
    schedule = even(1, "1f1b")
    assert schedule.simulate(5).seconds == 15 == schedule.seconds(5)


def test_one_forward_one_backward_holds_few_micro_batches_and_gpipe_all() -> None:
    assert even(4, "1f1b").simulate(32).under_way == (4, 3, 2, 1)
    assert even(4, "gpipe").simulate(32).under_way == (32, 32, 32, 32)
    # Narayanan et al., §2.2.2: the first device holds 2(p - 1) + (v - 1)p + 1 passes.
    schedule = even(4, "interleaved", parts=2)
    assert schedule.most_under_way(0, 32) == 2 * 3 + 4 + 1
    assert schedule.most_under_way(3, 32) == 4 + 1


def test_the_order_of_1f1b_on_two_stages() -> None:
    slots = even(2, "1f1b").simulate(3).slots
    words = defaultdict(list)
    for slot in slots:
        words[slot.device].append(("F" if slot.is_forward else "B") + str(slot.micro_batch))
    assert words[0] == ["F0", "F1", "B0", "F2", "B1", "B2"]
    assert words[1] == ["F0", "B0", "F1", "B1", "F2", "B2"]


def test_micro_batches_return_to_a_head_that_stands_apart() -> None:
    schedule = Schedule(pieces_of([0, 1], [0, 2], devices=2, head=(3, 6)), "1f1b")
    timeline = schedule.simulate(1)
    visits = [(slot.device, slot.piece, slot.is_forward) for slot in timeline.slots]
    assert visits == [
        (0, 0, True), (1, 1, True), (0, 2, True), (0, 2, False), (1, 1, False), (0, 0, False),
    ]  # fmt: skip
    assert timeline.seconds == 12


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, int]:
    """Any pipeline, and a number of micro-batches it can take."""
    stages = draw(st.integers(1, 5))
    name = draw(st.sampled_from(["1f1b", "gpipe", "interleaved"]))
    parts = 2 if name == "interleaved" and stages > 1 else 1
    times = st.lists(st.integers(0, 4), min_size=stages * parts, max_size=stages * parts)
    head = draw(st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9))) if stages > 1 else None
    pieces = pieces_of(draw(times), draw(times), devices=stages, head=head)
    return Schedule(pieces, name), stages * draw(st.integers(1, 6))


def check(schedule: Schedule, count: int, timeline: Timeline) -> None:
    """Every pass once, in order, none before its input, no device doing two things."""
    ends = {(s.piece, s.micro_batch, s.is_forward): s.end for s in timeline.slots}
    last = len(schedule.pieces) - 1
    assert len(ends) == len(timeline.slots) == 2 * count * (last + 1)
    for slot in timeline.slots:
        needed = (slot.piece - 1, slot.micro_batch, True)
        if not slot.is_forward:
            needed = (slot.piece + 1, slot.micro_batch, False)
            if slot.piece == last:
                needed = (last, slot.micro_batch, True)
        if needed[0] >= 0:
            assert ends[needed] <= slot.start
    for device in range(schedule.devices):
        mine = sorted((s.start, s.end) for s in timeline.slots if s.device == device)
        assert all(before[1] <= after[0] for before, after in zip(mine, mine[1:], strict=False))
    assert timeline.seconds == max(ends.values())


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_any_schedule_does_every_pass_once_and_in_order(case: tuple[Schedule, int]) -> None:
    schedule, count = case
    timeline = schedule.simulate(count)
    check(schedule, count, timeline)
    slowest = defaultdict(float)
    for piece in schedule.pieces:
        slowest[piece.device] += piece.forward + piece.backward
    assert timeline.seconds >= count * max(slowest.values()) - 1e-9
    for device in range(schedule.devices):
        blocks = schedule.blocks(device)
        most = schedule.most_under_way(device, count)
        assert max((timeline.under_way[i] for i in blocks), default=0) <= most


@settings(max_examples=25, deadline=None)
@given(schedules(), st.integers(60, 150))
def test_long_steps_are_extended_as_whole_simulations_run(
    case: tuple[Schedule, int], rounds: int
) -> None:
    schedule = case[0]
    count = schedule.devices * rounds
    whole = schedule.simulate(count).seconds
    has_head = any(piece.is_head for piece in schedule.pieces)
    assert schedule.seconds(count) == pytest.approx(whole, rel=0.06 if has_head else 1e-9)
