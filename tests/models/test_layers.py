"""Dropout by keys, attention by blocks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError

from penstock.models.blockwise import blockwise_attention
from penstock.models.layers import dropout, dropout_keys, layer_norm
from tests.numerics import assert_matches


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(rate: float) -> None:
    x = torch.ones(8, 128, 64)
    dropped = dropout(x, dropout_keys(0, 0, torch.arange(8), 2, 3)[:, 1], rate)
    assert (dropped == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)


def test_masks_differ_between_sequences_steps_layers_sites_and_seeds() -> None:
    x = torch.ones(1, 4096)
    base = (0, 0, torch.tensor([0]), 0, 3)
    keys = [dropout_keys(*base)[:, site] for site in range(3)]
    keys += [dropout_keys(1, *base[1:])[:, 0], dropout_keys(0, 1, *base[2:])[:, 0]]
    keys += [dropout_keys(0, 0, torch.tensor([1]), 0, 3)[:, 0], dropout_keys(*base[:3], 1, 3)[:, 0]]
    masks = [dropout(x, key, 0.5) == 0 for key in keys]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.06)


def test_a_sequences_mask_does_not_depend_on_its_batch() -> None:
    x = torch.randn(6, 10, 4)
    keys = dropout_keys(3, 9, torch.arange(6), 1, 3)
    whole = dropout(x, keys[:, 2], 0.3)
    parts = [
        dropout(x[i : i + 2], dropout_keys(3, 9, torch.arange(i, i + 2), 1, 3)[:, 2], 0.3)
        for i in (0, 2, 4)
    ]
    assert torch.equal(whole, torch.cat(parts))


def lowbias32(x: np.ndarray) -> np.ndarray:
    """The published function, in unsigned 32-bit arithmetic."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def test_masks_are_lowbias32_of_a_counter_bit_for_bit() -> None:
    # Checkpoints of runs with dropout resume exactly only while these bits stay what they are.
    keys = [0, 1, 2**32, 2**63 - 1, 0x1234567890ABCDEF]
    x = torch.randn(len(keys), 5, 7, 11)
    dropped = dropout(x, torch.tensor(keys), 0.25)
    counter = np.arange(5 * 7 * 11, dtype=np.uint64).reshape(5, 7, 11) * np.uint64(0x9E3779B9)
    for row, key in enumerate(keys):
        low, high = np.uint64(key & 0xFFFFFFFF), np.uint32(key >> 32)
        bits = lowbias32(lowbias32((counter + low).astype(np.uint32)) ^ high)
        kept = torch.from_numpy(bits >= 2**30)
        expected = torch.where(kept, x[row] / 0.75, 0.0)
        assert torch.equal(dropped[row] != 0, kept)
        assert_matches(dropped[row], expected, 1e-6)


def test_masks_have_no_pattern_over_heads_queries_and_keys() -> None:
    kept = dropout(torch.ones(4, 6, 96, 96), dropout_keys(0, 0, torch.arange(4), 0, 3)[:, 0], 0.5)
    signs = (kept > 0).double() * 2 - 1
    spread = 1 / np.sqrt(signs[0].numel())
    for dimension in (1, 2, 3):
        for shift in (1, 2, 3, 8, 32):
            correlation = (signs * signs.roll(shift, dimension)).mean((1, 2, 3))
            assert correlation.abs().max() < 5 * spread
        others = [d for d in (1, 2, 3) if d != dimension]
        means = signs.mean(others)
        assert means.abs().max() < 5 * np.sqrt(signs.shape[dimension] / signs[0].numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_keeps_the_format_and_drops_the_same_in_the_backward_pass(
    dtype: torch.dtype,
) -> None:
    x = torch.ones(2, 64, 32, dtype=dtype, requires_grad=True)
    dropped = dropout(x, dropout_keys(0, 0, torch.arange(2), 0, 1)[:, 0], 0.2)
    dropped.sum().backward()
    assert dropped.dtype == dtype
    assert torch.equal(x.grad, dropped.detach())


def test_layer_norm_is_computed_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 33, 64, generator=g) + 3).bfloat16()
    weight, bias = (torch.randn(64, generator=g).bfloat16() for _ in range(2))
    wide = x.double()
    variance = wide.var(-1, unbiased=False, keepdim=True)
    expected = (wide - wide.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    expected = expected * weight.double() + bias.double()
    result = layer_norm(x, weight, bias, 1e-5)
    assert result.dtype == torch.bfloat16
    assert (result.double() - expected).abs().le(expected.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("length", [1, 255, 256, 300, 513])
def test_blockwise_attention_matches_float64(length: int) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, length, 8, generator=g) for _ in range(4)]
    leaves = [t.requires_grad_() for t in tensors[:3]]
    doubles = [t.detach().double().requires_grad_() for t in tensors[:3]]
    ours = blockwise_attention(*leaves)
    theirs = F.scaled_dot_product_attention(*doubles, is_causal=True)
    assert_matches(ours, theirs, 1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, tensors[3]),
        torch.autograd.grad(theirs, doubles, tensors[3].double()),
        strict=True,
    ):
        if b.abs().max() > 0:
            assert_matches(a, b, 1e-5)


def test_shapes_in_signatures_are_checked_in_tests() -> None:
    with pytest.raises(TypeCheckError):
        layer_norm(torch.zeros(2, 3), torch.ones(4), torch.zeros(3), 1e-5)
