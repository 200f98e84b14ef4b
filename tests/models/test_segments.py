"""Attention confined to segments: packed documents, padding, and models that see both ways."""

import dataclasses

import pytest
import torch

from penstock.config.schema import ModelSection
from penstock.models.blockwise import blockwise_attention
from penstock.models.initialization import initialize
from penstock.models.resolve import resolve_architecture
from penstock.models.rotary import positions_within
from penstock.models.transformer import Transformer
from tests.numerics import assert_matches

LENGTHS = (5, 1, 17, 9)
"""Of the documents packed into one row."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [7, 300, 600])
def test_attention_within_segments_matches_float64(length: int, is_causal: bool) -> None:
    leaves = [random(2, 3, length, 8, seed=i).requires_grad_() for i in range(3)]
    generator = torch.Generator().manual_seed(9)
    segments = torch.randint(-1, 3, (2, length), generator=generator)
    ours = blockwise_attention(*leaves, segments, is_causal=is_causal)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mask = (segments[:, :, None] == segments[:, None, :]).unsqueeze(1)
    mask = mask.tril() if is_causal else mask
    theirs = torch.nn.functional.scaled_dot_product_attention(*wide, mask)
    assert_matches(ours, theirs, 1e-5)
    upstream = random(2, 3, length, 8, seed=5)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, wide, upstream.double()),
        strict=True,
    ):
        assert_matches(mine, other, 1e-5)


@pytest.mark.parametrize("length", [7, 600])
def test_attention_both_ways_matches_float64(length: int) -> None:
    leaves = [random(2, 3, length, 8, seed=i).requires_grad_() for i in range(3)]
    ours = blockwise_attention(*leaves, is_causal=False)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    theirs = torch.nn.functional.scaled_dot_product_attention(*wide)
    assert_matches(ours, theirs, 1e-5)
    for mine, other in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(theirs.square().sum(), wide),
        strict=True,
    ):
        assert_matches(mine, other, 1e-5)


def test_positions_start_again_with_each_segment() -> None:
    segments = torch.tensor([[0, 0, 1, 2, 2, 2, -1, -1], [4, 4, 4, 4, 0, 0, 4, 4]])
    expected = [[0, 1, 0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 1, 0, 1]]
    assert positions_within(segments).tolist() == expected


@pytest.mark.parametrize("preset", ["gpt2-tiny", "pythia-tiny", "gpt-j-tiny", "llama-tiny"])
@pytest.mark.parametrize("dropout", [0.0, 1e-6])  # with it, the scores are made whole
def test_packed_documents_equal_each_document_alone(preset: str, dropout: float) -> None:
    architecture = resolve_architecture(ModelSection(preset=preset, dropout=dropout))
    model = Transformer(architecture)
    initialize(model, 1)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * random(*parameter.shape, seed=index))
    tokens = torch.randint(0, 512, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    segments = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    packed = loss_of(model, tokens, segments)
    gradients = torch.autograd.grad(packed, list(model.parameters()))
    alone = sum(loss_of(model, part, None) for part in tokens.split(LENGTHS, 1))
    assert_matches(packed, alone, 1e-5)
    for ours, theirs in zip(
        gradients, torch.autograd.grad(alone, list(model.parameters())), strict=True
    ):
        assert_matches(ours, theirs, 1e-4)
    assert abs(loss_of(model, tokens, None) - alone) > 1e-2


def loss_of(
    model: Transformer, tokens: torch.Tensor, segments: torch.Tensor | None
) -> torch.Tensor:
    """The loss of made-up targets that depend on the token alone, with dropout that drops hardly
    anything where the model has some.
    """
    targets = (tokens * 7 + 3) % 512
    keys = model.dropout_keys(0, 0, torch.arange(1))
    return model(tokens, targets, torch.ones(tokens.shape), keys, None, segments)


def test_padding_changes_nothing_in_a_model_that_sees_both_ways() -> None:
    architecture = resolve_architecture(ModelSection(preset="gpt2-tiny"))
    model = Transformer(dataclasses.replace(architecture, is_causal=False))
    tokens = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(3))
    segments = torch.zeros(2, 20, dtype=torch.int64)
    segments[1, 13:] = -1
    logits = model(tokens, segments=segments)
    assert_matches(logits[0], model(tokens[:1])[0], 1e-5)
    assert_matches(logits[1, :13], model(tokens[1:, :13])[0], 1e-5)
    assert not torch.allclose(model(tokens)[1, :13], logits[1, :13], atol=1e-3)
