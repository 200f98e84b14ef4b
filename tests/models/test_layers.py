"""Dropout by keys, attention by blocks."""

import pytest
import torch
import torch.nn.functional as F

from penstock.models.blockwise import causal_attention
from penstock.models.layers import dropout, dropout_keys
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


@pytest.mark.parametrize("length", [1, 255, 256, 300, 513])
def test_blockwise_attention_matches_float64(length: int) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, length, 8, generator=g) for _ in range(4)]
    leaves = [t.requires_grad_() for t in tensors[:3]]
    doubles = [t.detach().double().requires_grad_() for t in tensors[:3]]
    ours = causal_attention(*leaves)
    theirs = F.scaled_dot_product_attention(*doubles, is_causal=True)
    assert_matches(ours, theirs, 1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, tensors[3]),
        torch.autograd.grad(theirs, doubles, tensors[3].double()),
        strict=True,
    ):
        if b.abs().max() > 0:
            assert_matches(a, b, 1e-5)
