"""The model's other paths: decoding with a cache, dropout in its place, the head's loss."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from penstock.inference.decoding import EagerDecoder
from penstock.models.layers import dropout
from penstock.models.transformer import Transformer
from tests.models.test_parity import architecture, ours_from, reference_model, tokens_for
from tests.numerics import assert_matches


def model_for(**fields: object) -> Transformer:
    """Random weights far from zero, biases and norms included."""
    torch.manual_seed(7)
    model = Transformer(architecture(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.1)
    return model.requires_grad_(False)


@pytest.mark.parametrize("pieces", [[33], [20, 13], [1] * 33, [30, 1, 1, 1]])
def test_decoding_in_pieces_equals_the_full_forward_pass(pieces: list[int]) -> None:
    model = model_for()
    tokens = tokens_for(model.architecture)
    decoder = EagerDecoder(model)
    decoder.begin(torch.zeros(len(tokens), dtype=torch.int64), 33)
    whole = model(tokens)
    start = 0
    for size in pieces:
        end = start + size
        assert_matches(decoder.extend(tokens[:, start:end]), whole[:, end - 1], 1e-5)
        start = end


def test_left_padding_changes_no_logits() -> None:
    model = model_for()
    tokens = tokens_for(model.architecture, rows=3, length=12)
    padding = torch.tensor([0, 5, 11])
    decoder = EagerDecoder(model)
    decoder.begin(padding, 12)
    logits = decoder.extend(tokens)
    for row, count in enumerate(padding.tolist()):
        alone = model(tokens[row : row + 1, count:])
        assert_matches(logits[row], alone[0, -1], 1e-5)


def test_greedy_ids_equal_transformers(tmp_path: Path) -> None:
    a = architecture()
    reference = reference_model(a)
    decoder = EagerDecoder(ours_from(reference, a, tmp_path))
    prompt = tokens_for(a, rows=1, length=7)
    expected = reference.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    decoder.begin(torch.zeros(1, dtype=torch.int64), 27)
    ids, new = prompt, prompt
    while ids.shape[1] < expected.shape[1]:
        new = decoder.extend(new).argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
    assert torch.equal(ids, expected)


def test_token_losses_equal_cross_entropy_of_the_logits() -> None:
    model = model_for()
    tokens = tokens_for(model.architecture)
    targets = tokens.roll(-1, 1)
    expected = F.cross_entropy(model(tokens).double().mT, targets, reduction="none")
    assert_matches(model.token_losses(tokens, targets), expected, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weighted_loss_and_its_gradients_equal_the_plain_definition(tied: bool) -> None:
    model = model_for(tie_embeddings=tied).requires_grad_()
    tokens = tokens_for(model.architecture)
    targets = tokens.roll(-1, 1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(tokens.shape, generator=generator)
    loss = model(tokens, targets, weights, None, torch.tensor(1e-2))
    # A factor on the loss must reach the gradients, which the forward pass has already made.
    gradients = torch.autograd.grad(3 * loss, list(model.parameters()))
    logits = model(tokens).double()
    plain = F.cross_entropy(logits.mT, targets, reduction="none")
    plain = ((plain + 1e-2 * logits.logsumexp(-1).square()) * weights).sum()
    assert_matches(loss, plain, 1e-5)
    expected = torch.autograd.grad(3 * plain, list(model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_matches(ours, theirs, 1e-4)


def plain_block(
    values: dict[str, torch.Tensor], x: torch.Tensor, keys: torch.Tensor, heads: int, rate: float
) -> torch.Tensor:
    """GPT-2's block with dropout at its three sites, by definition, in float64."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ values[f"{name}.weight"].mT + values[f"{name}.bias"]

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        scale = centred.square().mean(-1, keepdim=True).add(1e-5).sqrt()
        return centred / scale * values[f"{name}.weight"] + values[f"{name}.bias"]

    length, size = x.shape[1], x.shape[2] // heads
    projected = linear("attention.query_key_value", norm("attention_norm", x))
    q, k, v = (
        part.view(*x.shape[:2], heads, size).transpose(1, 2) for part in projected.chunk(3, -1)
    )
    scores = q @ k.mT / size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    mixed = dropout(scores.softmax(-1), keys[:, 0], rate) @ v
    update = linear("attention.output", mixed.transpose(1, 2).reshape(x.shape))
    x = x + dropout(update, keys[:, 1], rate)
    up = linear("mlp.up", norm("mlp_norm", x))
    gelu = 0.5 * up * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)))
    return x + dropout(linear("mlp.down", gelu), keys[:, 2], rate)


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_a_block_with_dropout_equals_its_definition(rate: float) -> None:
    model = model_for(dropout=rate).requires_grad_()
    block = model.blocks[1]
    torch.manual_seed(3)
    x = torch.randn(3, 17, 48, requires_grad=True)
    keys = model.dropout_keys(0, 4, torch.arange(3))[2]
    values = {n: p.detach().double().requires_grad_() for n, p in block.named_parameters()}
    wide = x.detach().double().requires_grad_()
    ours, theirs = block(x, keys), plain_block(values, wide, keys, 3, rate)
    assert_matches(ours, theirs, 1e-5)
    seed = torch.randn(x.shape)
    for a, b in zip(
        torch.autograd.grad(ours, [x, *block.parameters()], seed),
        torch.autograd.grad(theirs, [wide, *values.values()], seed.double()),
        strict=True,
    ):
        assert_matches(a, b, 1e-4)


def test_any_split_of_the_batch_gives_the_same_dropped_outputs() -> None:
    model = model_for(dropout=0.3)
    tokens = tokens_for(model.architecture, rows=4)
    whole = model(tokens, keys=model.dropout_keys(1, 2, torch.arange(4)))
    for split in ([[0, 1], [2, 3]], [[3], [0, 2], [1]]):
        for rows in split:
            keys = model.dropout_keys(1, 2, torch.tensor(rows))
            assert_matches(model(tokens[rows], keys=keys), whole[rows], 1e-5)


def test_without_keys_nothing_is_dropped() -> None:
    dropping, plain = model_for(dropout=0.5), model_for()
    tokens = tokens_for(plain.architecture)
    assert torch.equal(dropping(tokens), plain(tokens))
    assert plain.dropout_keys(0, 0, torch.arange(2)) is None


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_block_traces_with_fake_tensors_and_the_trace_computes_the_same(rate: float) -> None:
    model = model_for(dropout=rate)
    block = model.blocks[0]
    keys = model.dropout_keys(0, 0, torch.arange(2))
    inputs = (torch.randn(2, 9, 48),) + (() if keys is None else (keys[1],))
    values = dict(block.named_parameters())

    def forward(values: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(block, values, inputs)

    before = [value.clone() for value in inputs]
    graph = make_fx(forward, tracing_mode="fake")(values, *inputs)
    assert torch.equal(graph(values, *inputs), block(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
