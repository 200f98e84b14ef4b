"""Schedules against their closed forms and transformers' own, over all settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup

from penstock.config.schema import ScheduleSection
from penstock.errors import ConfigError
from penstock.training.schedule import check_schedule, learning_rate

NAMES = ("cosine", "linear", "constant", "wsd")


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleSection, float, int]:
    """Any schedule `check_schedule` accepts: section, peak, total steps."""
    total = draw(st.integers(1, 400))
    warmup = draw(st.integers(0, total - 1))
    peak = draw(st.floats(1e-8, 1.0))
    decay = draw(st.none() | st.integers(1, total - warmup))
    section = ScheduleSection(
        name=draw(st.sampled_from(NAMES)),
        warmup=warmup,
        min_lr=peak * draw(st.floats(0.0, 1.0)),
        decay=decay,
    )
    check_schedule(section, peak, total)
    return section, peak, total


@given(schedules())
@settings(max_examples=200, deadline=None)
def test_the_rate_stays_within_its_bounds_and_ends_at_the_minimum(
    case: tuple[ScheduleSection, float, int],
) -> None:
    section, peak, total = case
    rates = [learning_rate(step, section, peak, total) for step in range(total + 3)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates[: section.warmup])
    after = rates[section.warmup :]
    assert all(section.min_lr * (1 - 1e-12) <= rate <= peak * (1 + 1e-12) for rate in after)
    assert after == sorted(after, reverse=True)
    assert after[0] == pytest.approx(peak)
    end = peak if section.name == "constant" else section.min_lr
    assert rates[total:] == pytest.approx([end] * 3)


@given(schedules())
@settings(max_examples=200, deadline=None)
def test_the_rate_never_jumps(case: tuple[ScheduleSection, float, int]) -> None:
    section, peak, total = case
    rates = [learning_rate(step, section, peak, total) for step in range(total + 1)]
    room = total - section.warmup
    length = room
    if section.name == "wsd":
        length = min(room, section.decay or max(1, total // 5))
    steepest = math.pi / 2 if section.name == "cosine" else 1.0
    largest = max(peak / section.warmup if section.warmup else 0.0, peak * steepest / length)
    for before, after in zip(rates, rates[1:], strict=False):
        assert abs(after - before) <= largest * (1 + 1e-9)


def test_warm_up_is_linear_and_uses_its_first_step() -> None:
    section = ScheduleSection(warmup=4)
    rates = [learning_rate(step, section, 8.0, 100) for step in range(5)]
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0]


def test_cosine_equals_the_one_of_transformers_after_the_warm_up() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    reference = get_cosine_schedule_with_warmup(optimizer, 10, 60)
    section = ScheduleSection(name="cosine", warmup=10)
    for step in range(60):
        if step >= 10:
            ours = learning_rate(step, section, 0.3, 60)
            assert ours == pytest.approx(reference.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("name", "quarter", "half"),
    [
        ("cosine", 1 + 9 * (0.5 + math.sqrt(0.125)), 5.5),
        ("linear", 1 + 9 * 0.75, 5.5),
        ("constant", 10.0, 10.0),
        ("wsd", 10.0, 10.0),
    ],
)
def test_rates_at_a_quarter_and_half_of_the_decay(name: str, quarter: float, half: float) -> None:
    section = ScheduleSection(name=name, min_lr=1.0)
    assert learning_rate(100, section, 10.0, 400) == pytest.approx(quarter)
    assert learning_rate(200, section, 10.0, 400) == pytest.approx(half)


def test_wsd_is_flat_and_then_falls_linearly_over_the_last_fifth() -> None:
    section = ScheduleSection(name="wsd", min_lr=2.0, warmup=10)
    rates = [learning_rate(step, section, 10.0, 100) for step in range(101)]
    assert rates[10:81] == [10.0] * 71
    assert rates[90] == pytest.approx(6.0)
    assert rates[100] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (ScheduleSection(warmup=100), "schedule.warmup"),
        (ScheduleSection(warmup=101, name="constant"), "schedule.warmup"),
        (ScheduleSection(min_lr=0.2), "schedule.min_lr"),
        (ScheduleSection(name="wsd", warmup=50, decay=51), "schedule.decay"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_by_key(section: ScheduleSection, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_schedule(section, 0.1, 100)
    assert caught.value.where == key
    assert caught.value.do


def test_a_constant_schedule_ignores_the_minimum() -> None:
    check_schedule(ScheduleSection(name="constant", min_lr=1.0), 0.1, 10)
    assert learning_rate(9, ScheduleSection(name="constant", min_lr=1.0), 0.1, 10) == 0.1
