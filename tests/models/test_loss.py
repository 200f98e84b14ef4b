"""The chunked loss against PyTorch's cross entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from penstock.models.loss import (
    HeadGradients,
    HeadOptions,
    HeadWeights,
    loss_and_gradients,
    token_losses,
)
from tests.numerics import assert_matches

B, T, D, V, PADDED = 3, 7, 16, 50, 128


def inputs() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    projection = torch.randn(PADDED, D, generator=g)
    return {
        "norm_weight": torch.randn(D, generator=g),
        "norm_bias": torch.randn(D, generator=g),
        "projection": projection,
        "x": torch.randn(B, T, D, generator=g),
        "targets": torch.randint(0, V, (B, T), generator=g),
        "loss_weights": torch.rand(B, T, generator=g) * (torch.rand(B, T, generator=g) > 0.3),
        "z_loss": torch.tensor(1e-2),
    }


def split(values: dict[str, torch.Tensor | None]) -> tuple[HeadWeights, list[torch.Tensor]]:
    """The head's weights, and the other inputs in the order the loss takes them."""
    weights = {name: values[name] for name in HeadWeights._fields if name in values}
    order = ("x", "targets", "loss_weights", "z_loss")
    return HeadWeights(**weights), [values[name] for name in order if name in values]


def result_of(values: dict[str, torch.Tensor | None], chunks: int) -> HeadGradients:
    weights, rest = split(values)
    return loss_and_gradients(weights, *rest, HeadOptions(1e-5, "gelu", V, chunks))


def losses_of(values: dict[str, torch.Tensor | None], chunks: int) -> torch.Tensor:
    weights, rest = split(values)
    return token_losses(weights, *rest[:2], HeadOptions(1e-5, "gelu", V, chunks))


def reference(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    double = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    leaves = [double[k].requires_grad_() for k in ("x", "norm_weight", "norm_bias", "projection")]
    normalized = F.layer_norm(leaves[0], (D,), leaves[1], leaves[2], 1e-5)
    logits = (normalized @ leaves[3][:V].t()).flatten(0, 1)
    nll = F.cross_entropy(logits, double["targets"].flatten(), reduction="none")
    z = torch.logsumexp(logits, -1).square() * double["z_loss"]
    loss = ((nll + z) * double["loss_weights"].flatten()).sum()
    return loss, list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("chunks", [1, 2, 5, 21])
def test_loss_and_gradients_match_float64_for_any_chunking(chunks: int) -> None:
    values = inputs()
    loss, gradients = reference(inputs())
    result = result_of(values, chunks)
    assert_matches(result.loss, loss, 1e-5)
    weights = result.weights
    for ours, theirs in zip(
        (result.x, weights.norm_weight, weights.norm_bias, weights.projection),
        gradients,
        strict=True,
    ):
        assert_matches(ours, theirs, 1e-5)
    assert weights.projection[V:].abs().max() == 0


def test_weight_zero_tokens_do_not_count() -> None:
    values = inputs()
    first = result_of(values, 3)
    ignored = values["loss_weights"] == 0
    values["targets"] = torch.where(ignored, (values["targets"] + 1) % V, values["targets"])
    second = result_of(values, 3)
    assert torch.equal(first.loss, second.loss)


def test_token_losses_match_float64() -> None:
    values = inputs()
    ours = losses_of(values, 4)
    double = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    normalized = F.layer_norm(double["x"], (D,), double["norm_weight"], double["norm_bias"], 1e-5)
    logits = (normalized @ double["projection"][:V].t()).flatten(0, 1)
    theirs = F.cross_entropy(logits, values["targets"].flatten(), reduction="none")
    assert_matches(ours, theirs.view(B, T), 1e-5)


@pytest.mark.parametrize("chunks", [1, 5])
def test_a_projections_bias_and_a_norm_without_one_match_float64(chunks: int) -> None:
    values = inputs()
    values["norm_bias"] = None
    bias = torch.randn(PADDED, generator=torch.Generator().manual_seed(4))
    wide = {k: v.double() for k, v in values.items() if v is not None and v.is_floating_point()}
    leaves = [wide[k].requires_grad_() for k in ("x", "norm_weight", "projection")]
    leaves.append(bias.double().requires_grad_())
    scale = (leaves[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    rows = leaves[0] * scale * leaves[1]
    logits = (rows @ leaves[2][:V].t() + leaves[3][:V]).flatten(0, 1)
    nll = F.cross_entropy(logits, values["targets"].flatten(), reduction="none")
    z = torch.logsumexp(logits, -1).square() * wide["z_loss"]
    loss = ((nll + z) * wide["loss_weights"].flatten()).sum()
    gradients = torch.autograd.grad(loss, leaves)
    values["bias"] = bias
    result = result_of(values, chunks)
    assert_matches(result.loss, loss, 1e-5)
    found = result.weights
    assert found.norm_bias is None
    ours = (result.x, found.norm_weight, found.projection, found.bias)
    for mine, theirs in zip(ours, gradients, strict=True):
        assert_matches(mine, theirs, 1e-5)
    assert found.bias[V:].abs().max() == 0
    assert_matches(losses_of(values, chunks).flatten(), nll, 1e-5)


def test_a_dense_layer_before_the_norm_matches_float64() -> None:
    values = inputs()
    g = torch.Generator().manual_seed(6)
    values |= {
        "x": torch.randn(B, T, 24, generator=g),
        "transform_weight": torch.randn(D, 24, generator=g) / 5,
        "transform_bias": torch.randn(D, generator=g),
    }
    wide = {k: v.double() for k, v in values.items() if v.is_floating_point()}
    names = ("transform_weight", "transform_bias", "norm_weight", "norm_bias", "projection")
    leaves = [wide[k].requires_grad_() for k in ("x", *names)]
    dense = F.gelu(F.linear(leaves[0], *leaves[1:3]))
    logits = F.layer_norm(dense, (D,), *leaves[3:5], 1e-5) @ leaves[5][:V].t()
    nll = F.cross_entropy(logits.flatten(0, 1), values["targets"].flatten(), reduction="none")
    z = torch.logsumexp(logits, -1).flatten().square() * wide["z_loss"]
    loss = ((nll + z) * wide["loss_weights"].flatten()).sum()
    result = result_of(values, 3)
    ours = [result.x, *(getattr(result.weights, name) for name in names)]
    for mine, theirs in zip(ours, torch.autograd.grad(loss, leaves), strict=True):
        assert_matches(mine, theirs, 1e-5)
    assert_matches(result.loss, loss, 1e-5)
    assert_matches(losses_of(values, 2).flatten(), nll, 1e-5)


def test_without_a_norm_the_projection_reads_its_input() -> None:
    values = {k: v for k, v in inputs().items() if not k.startswith("norm")}
    x, projection = (values[k].double().requires_grad_() for k in ("x", "projection"))
    logits = (x @ projection[:V].t()).flatten(0, 1)
    nll = F.cross_entropy(logits, values["targets"].flatten(), reduction="none")
    z = torch.logsumexp(logits, -1).square() * values["z_loss"].double()
    loss = ((nll + z) * values["loss_weights"].double().flatten()).sum()
    result = result_of(values, 2)
    for mine, theirs in zip(
        (result.x, result.weights.projection),
        torch.autograd.grad(loss, [x, projection]),
        strict=True,
    ):
        assert_matches(mine, theirs, 1e-5)
