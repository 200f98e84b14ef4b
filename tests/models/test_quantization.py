"""8-bit weights: the rounding's bound, and what it leaves alone."""

import torch

from penstock.models.architecture import WEIGHT_GROUP, Architecture
from penstock.models.initialization import initialize
from penstock.models.quantization import dequantize, quantize, round_weights
from penstock.models.transformer import Transformer


def test_each_weight_is_rounded_to_the_nearest_step_of_its_group() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 2 * WEIGHT_GROUP + 7, generator=generator)
    weight[0, 3] = 40.0  # coarsens its own group alone
    weight[1, :WEIGHT_GROUP] = 0
    whole, scale = quantize(weight)
    assert whole.dtype == torch.int8
    assert whole.abs().max() == 127
    assert scale.shape == (5, 3)
    step = torch.stack([group.abs().amax(1) / 127 for group in weight.split(WEIGHT_GROUP, 1)], 1)
    error = (dequantize(whole, scale) - weight).abs()
    for index, group in enumerate(error.split(WEIGHT_GROUP, 1)):
        assert (group <= 0.5001 * step[:, index : index + 1]).all()
    assert (dequantize(whole, scale)[1, :WEIGHT_GROUP] == 0).all()
    again = dequantize(*quantize(dequantize(whole, scale)))
    assert torch.allclose(again, dequantize(whole, scale), rtol=1e-6)


def test_a_model_keeps_its_embeddings_and_norms() -> None:
    architecture = Architecture(
        family="gpt2", layers=2, hidden_size=24, heads=3, mlp_size=96, max_positions=16,
        vocab_size=97,
    )  # fmt: skip
    model, rounded = Transformer(architecture), Transformer(architecture)
    for each in (model, rounded):
        initialize(each, 1)
    round_weights(rounded)
    before = dict(model.named_parameters(remove_duplicate=False))
    changed = {
        name
        for name, value in rounded.named_parameters(remove_duplicate=False)
        if not torch.equal(value, before[name])
    }
    matrices = ("attention.query_key_value", "attention.output", "mlp.up", "mlp.down")
    expected = {f"blocks.{i}.{name}.weight" for i in range(2) for name in matrices}
    assert changed == {*expected, "head.projection.weight"}
