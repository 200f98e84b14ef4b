"""The chunked loss against PyTorch's cross entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from penstock.models.loss import loss_and_gradients, token_losses
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
    result = loss_and_gradients(**values, epsilon=1e-5, vocab_size=V, chunks=chunks)
    assert_matches(result.loss, loss, 1e-5)
    for ours, theirs in zip(
        (result.x, result.norm_weight, result.norm_bias, result.projection), gradients, strict=True
    ):
        assert_matches(ours, theirs, 1e-5)
    assert result.projection[V:].abs().max() == 0


def test_weight_zero_tokens_do_not_count() -> None:
    values = inputs()
    first = loss_and_gradients(**values, epsilon=1e-5, vocab_size=V, chunks=3)
    ignored = values["loss_weights"] == 0
    values["targets"] = torch.where(ignored, (values["targets"] + 1) % V, values["targets"])
    second = loss_and_gradients(**values, epsilon=1e-5, vocab_size=V, chunks=3)
    assert torch.equal(first.loss, second.loss)


def test_token_losses_match_float64() -> None:
    values = inputs()
    weights = values.pop("loss_weights")
    values.pop("z_loss")
    ours = token_losses(**values, epsilon=1e-5, vocab_size=V, chunks=4)
    double = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    normalized = F.layer_norm(double["x"], (D,), double["norm_weight"], double["norm_bias"], 1e-5)
    logits = (normalized @ double["projection"][:V].t()).flatten(0, 1)
    theirs = F.cross_entropy(logits, values["targets"].flatten(), reduction="none")
    assert_matches(ours, theirs.view(weights.shape), 1e-5)


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
    options = {"epsilon": 1e-5, "vocab_size": V, "chunks": chunks, "bias": bias}
    result = loss_and_gradients(**values, **options)
    assert_matches(result.loss, loss, 1e-5)
    assert result.norm_bias is None
    ours = (result.x, result.norm_weight, result.projection, result.bias)
    for mine, theirs in zip(ours, gradients, strict=True):
        assert_matches(mine, theirs, 1e-5)
    assert result.bias[V:].abs().max() == 0
    weights = {k: values[k] for k in ("norm_weight", "norm_bias", "projection", "x", "targets")}
    assert_matches(token_losses(**weights, **options).flatten(), nll, 1e-5)
