"""The comparison itself: it must bite."""

import pytest
import torch

from tests.numerics import assert_matches

REFERENCE = torch.linspace(-2, 3, 50)


def test_equal_values_match() -> None:
    assert_matches(REFERENCE.clone(), REFERENCE, 0.0)
    assert_matches(REFERENCE + 2e-4, REFERENCE, 1e-4)


@pytest.mark.parametrize(
    "actual",
    [
        REFERENCE * 1.001,
        REFERENCE + 4e-4,
        REFERENCE.roll(1),
        torch.where(REFERENCE == 3, torch.nan, REFERENCE),
        torch.where(REFERENCE == 3, torch.inf, REFERENCE),
    ],
)
def test_wrong_values_are_rejected(actual: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_matches(actual, REFERENCE, 1e-4)


def test_other_shapes_and_references_that_prove_nothing_are_rejected() -> None:
    with pytest.raises(AssertionError):
        assert_matches(REFERENCE.unsqueeze(0), REFERENCE, 1.0)
    for nothing in (torch.zeros(3), torch.full((3,), torch.nan)):
        with pytest.raises(AssertionError):
            assert_matches(nothing, nothing, 1.0)
    with pytest.raises(AssertionError):
        assert_matches(REFERENCE, torch.where(REFERENCE == 3, torch.inf, REFERENCE), 1e-4)
