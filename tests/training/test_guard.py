"""Which steps the guard lets through, what it counts, when it stops the run."""

import json
import math

import pytest
import torch

from penstock.config.schema import TrainSection
from penstock.errors import CheckpointError, UserError
from penstock.training.guard import Guard, Limits, TrainingStoppedError


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_step_with_nan_or_infinity_is_skipped_and_counted(loss: float, norm: float) -> None:
    guard = Guard(TrainSection())
    assert not guard.admit(0, loss, norm)
    assert guard.skipped == 1
    assert guard.mean_norm is None
    assert guard.admit(1, 2.0, 1.0)
    assert guard.skipped == 1


def test_the_mean_norm_is_the_bias_corrected_exponential_mean() -> None:
    guard = Guard(TrainSection())
    norms = [3.0, 1.0, 4.0, 1.5, 9.0]
    for step, norm in enumerate(norms):
        guard.admit(step, 1.0, norm)
    weights = [0.98 ** (len(norms) - 1 - i) for i in range(len(norms))]
    expected = sum(w * n for w, n in zip(weights, norms, strict=True)) / sum(weights)
    assert guard.mean_norm == pytest.approx(expected, rel=1e-12)


def test_a_spike_is_skipped_once_there_is_history_and_leaves_the_mean_alone() -> None:
    guard = Guard(TrainSection(spike_factor=5.0))
    for step in range(19):
        assert guard.admit(step, 1.0, 2.0)
        assert guard.limits.grad_norm == math.inf
    assert guard.admit(19, 1.0, 2.0)
    assert guard.limits.grad_norm == pytest.approx(10.0)
    assert guard.admit(20, 1.0, 9.9)
    limit = guard.limits.grad_norm
    assert not guard.admit(21, 1.0, limit * 1.001)
    assert guard.limits.grad_norm == limit
    assert guard.skipped == 1


def test_without_a_spike_factor_a_large_finite_norm_passes() -> None:
    guard = Guard(TrainSection())
    assert all(guard.admit(step, 1.0, 1.0) for step in range(30))
    assert guard.admit(30, 1.0, 1e30)


def test_a_loss_far_above_its_running_mean_is_a_spike_whatever_the_norm() -> None:
    guard = Guard(TrainSection(loss_spike_factor=1.5, bad_steps=1))
    losses = [6.0 - n / 10 for n in range(20)]
    for step, loss in enumerate(losses):
        assert guard.limits == Limits(math.inf, math.inf)
        assert guard.admit(step, loss, 1.0)
    weights = [0.98**age for age in reversed(range(20))]
    mean = sum(w * n for w, n in zip(weights, losses, strict=True)) / sum(weights)
    assert guard.limits.loss == pytest.approx(1.5 * mean, rel=1e-6)
    assert guard.limits.grad_norm == math.inf
    assert guard.admit(20, 1.49 * mean, 1e9)
    limit = guard.limits.loss
    assert not guard.admit(21, 1.01 * limit, 1.0)
    assert (guard.limits.loss, guard.skipped) == (limit, 1)
    words = rf"loss {2 * limit:g} \(limit {limit:g}\), gradient norm 1 \(limit inf\)"
    with pytest.raises(TrainingStoppedError, match=words):
        guard.admit(22, 2 * limit, 1.0)


def test_a_history_from_before_losses_were_counted_is_taken_up() -> None:
    guard = Guard(TrainSection(spike_factor=2.0, loss_spike_factor=2.0))
    guard.load_state_dict({"skipped": 0, "applied": 30, "sum": 0.5})
    assert math.isfinite(guard.limits.grad_norm)
    assert guard.limits.loss == math.inf


def test_one_skip_too_many_stops_the_run_with_a_message_that_helps() -> None:
    guard = Guard(TrainSection(bad_steps=2))
    assert not guard.admit(4, math.nan, 1.0)
    assert guard.admit(5, 1.0, 1.0)
    assert not guard.admit(6, math.nan, 1.0)
    with pytest.raises(TrainingStoppedError, match=r"3 steps were skipped.*step 7.*optimizer\.lr"):
        guard.admit(7, math.nan, 1.0)
    assert issubclass(TrainingStoppedError, UserError)


def test_the_history_survives_a_checkpoint_exactly() -> None:
    section = TrainSection(spike_factor=2.0, loss_spike_factor=1.5, bad_steps=9)
    guard = Guard(section)
    for step in range(33):
        guard.admit(step, 3.0 - step / 99, 1.0 + math.sin(step) / 7)
    guard.admit(33, math.nan, 1.0)
    resumed = Guard(section)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert (resumed.limits, resumed.skipped) == (guard.limits, guard.skipped)
    for step in range(34, 50):
        norm = 1.0 + math.cos(step)
        loss = 2.0 + 3.0 * (step % 5 == 0)
        assert resumed.admit(step, loss, norm) == guard.admit(step, loss, norm)
    assert resumed.state_dict() == guard.state_dict()


@pytest.mark.parametrize(
    "state",
    [{}, {"skipped": -1, "applied": 0, "sum": 0.0}, {"skipped": "x", "applied": 0, "sum": 0.0}],
)
def test_a_damaged_history_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        Guard(TrainSection()).load_state_dict(state)


def test_the_limit_is_a_float32_so_that_a_device_decides_alike() -> None:
    guard = Guard(TrainSection(spike_factor=1.1))
    for step in range(25):
        assert guard.admit(step, 1.0, 1.0 + step / 777)
    limit = guard.limits.grad_norm
    assert torch.tensor(limit, dtype=torch.float32).item() == limit
    just_above = torch.nextafter(torch.tensor(limit), torch.tensor(math.inf))
    for norm in (torch.tensor(limit), just_above):
        on_device = bool(norm <= limit)
        assert guard.admit(30, 1.0, norm.item(), limits=Limits(math.inf, limit)) == on_device
    assert guard.skipped == 1


def test_norms_too_large_for_a_float32_limit_set_none() -> None:
    guard = Guard(TrainSection(spike_factor=1e9))
    for step in range(25):
        guard.admit(step, 1.0, 1e38)
    assert guard.limits.grad_norm == math.inf


def test_a_step_read_late_is_judged_by_the_limit_it_ran_under() -> None:
    guard = Guard(TrainSection(spike_factor=2.0))
    for step in range(19):
        guard.admit(step, 1.0, 1.0)
    limit = guard.limits.grad_norm
    assert limit == math.inf
    assert guard.admit(19, 1.0, 1.0)
    assert guard.admit(20, 1.0, 50.0, limits=Limits(math.inf, limit))
    assert guard.skipped == 0


def test_skipped_steps_in_a_row_ask_to_go_back_once() -> None:
    guard = Guard(TrainSection(rollback_after=2, bad_steps=10))
    assert not guard.admit(1, math.nan, 1.0)
    assert guard.admit(2, 1.0, 1.0)
    assert not guard.admit(3, math.nan, 1.0)
    assert not guard.asks_to_roll_back()
    assert not guard.admit(4, 1.0, math.inf)
    resumed = Guard(TrainSection(rollback_after=2, bad_steps=10))
    resumed.load_state_dict(guard.state_dict())
    for one in (guard, resumed):
        assert one.asks_to_roll_back()
        assert not one.asks_to_roll_back()
        assert one.skipped == 3
    resumed.load_state_dict({"skipped": 1, "applied": 3, "sum": 0.5})
    assert not resumed.asks_to_roll_back()
