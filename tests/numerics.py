"""How tests compare numbers: against an independent reference, on the reference's own scale."""

import math

from torch import Tensor


def assert_matches(actual: Tensor, reference: Tensor, relative: float) -> None:
    """The largest error must be below `relative` × the reference's largest magnitude."""
    assert actual.shape == reference.shape, (actual.shape, reference.shape)
    reference = reference.detach().double()
    scale = reference.abs().max().item()
    assert 0 < scale < math.inf, "a reference of zeros or without bound proves nothing"
    error = (actual.detach().double() - reference).abs().max().item()
    assert error <= relative * scale, f"error {error:.3e} on a scale of {scale:.3e}"
