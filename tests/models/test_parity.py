"""Our GPT-2 against `transformers`: logits, gradients, folders in both directions."""

from pathlib import Path

import pytest
import torch
import transformers

from penstock.errors import CheckpointError
from penstock.models.architecture import Architecture
from penstock.models.families.gpt2 import PRESETS, hf_names
from penstock.models.huggingface import load_weights, save_weights, to_stored
from penstock.models.initialization import initialize
from penstock.models.resolve import read_hf_config
from penstock.models.transformer import Transformer
from tests.numerics import assert_matches

ODD = {"layers": 2, "hidden_size": 48, "heads": 3, "max_positions": 40, "vocab_size": 97}


def architecture(**fields: object) -> Architecture:
    values = {**ODD, **fields}
    values.setdefault("mlp_size", 4 * values["hidden_size"])
    return Architecture(family="gpt2", **values)


def reference_model(a: Architecture) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=a.vocab_size,
        n_positions=a.max_positions,
        n_embd=a.hidden_size,
        n_layer=a.layers,
        n_head=a.heads,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.08,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():  # biases and norms away from 0 and 1
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def ours_from(
    reference: transformers.GPT2LMHeadModel, a: Architecture, folder: Path
) -> Transformer:
    reference.save_pretrained(folder)
    model = Transformer(a)
    load_weights(folder, model)
    return model


def tokens_for(a: Architecture, rows: int = 3, length: int = 33) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, a.vocab_size, (rows, min(length, a.max_positions)), generator=generator)


def compare(a: Architecture, folder: Path, length: int = 33) -> None:
    reference = reference_model(a)
    model = ours_from(reference, a, folder)
    tokens = tokens_for(a, length=length)
    theirs = reference(tokens, labels=tokens)
    logits = model(tokens)
    assert (logits - theirs.logits).abs().max() < 1e-4
    weights = torch.full((tokens.shape[0], tokens.shape[1] - 1), 1.0)
    loss = model(tokens[:, :-1], tokens[:, 1:], weights / weights.sum())
    assert abs(loss.item() - theirs.loss.item()) < 1e-5
    theirs.loss.backward()
    loss.backward()
    for name, place in hf_names(a).items():
        gradient = model.get_parameter(name).grad[: a.vocab_size if "tokens" in name else None]
        ((their_name, gradient),) = to_stored(place, gradient).items()
        expected = reference.get_parameter(their_name).grad
        assert_matches(gradient, expected, 1e-4)
        assert (gradient - expected).abs().max() < 1e-4, name
    assert not model.embed.tokens.weight.grad[a.vocab_size :].any()


def test_odd_sizes_match_transformers(tmp_path: Path) -> None:
    compare(architecture(), tmp_path)


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-demo", "gpt2-tiny"])
def test_preset_widths_match_transformers(preset: str, tmp_path: Path) -> None:
    compare(architecture(**{**PRESETS[preset], "layers": 1, "vocab_size": 1000}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_preset_shapes_match_transformers(preset: str, tmp_path: Path) -> None:
    compare(architecture(**{**PRESETS[preset], "layers": 2}), tmp_path, length=300)


def test_sequences_longer_than_an_attention_block_match(tmp_path: Path) -> None:
    compare(architecture(max_positions=600), tmp_path, length=555)


@pytest.mark.parametrize("damage", ["weight", "heads", "position", "epsilon"])
def test_the_comparison_rejects_a_wrong_model(damage: str, tmp_path: Path) -> None:
    a = architecture()
    reference = reference_model(a)
    model = ours_from(reference, a, tmp_path)
    tokens = tokens_for(a)
    with torch.no_grad():
        if damage == "weight":
            model.blocks[1].mlp.up.weight.mul_(1.001)
        elif damage == "heads":
            weight = model.blocks[0].attention.query_key_value.weight
            weight[:32] = weight[:32].roll(16, 0)
        elif damage == "position":
            weight = model.embed.positions.weight
            weight.copy_(weight.roll(1, 0))
        else:
            model.blocks[0].attention_norm.epsilon = 1e-3
        error = (model(tokens) - reference(tokens).logits).abs().max()
    assert error > 1e-4


def test_exported_folders_load_in_transformers(tmp_path: Path) -> None:
    a = architecture()
    model = Transformer(a)
    initialize(model, 3)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_weights(tmp_path, weights, a, tokenizer=None, end_of_text=96)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = tokens_for(a)
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    family, fields = read_hf_config(tmp_path)
    assert Architecture(family=family, **fields) == a


def test_sharded_and_legacy_files_load(tmp_path: Path) -> None:
    a = architecture()
    reference = reference_model(a)
    expected = reference(tokens_for(a)).logits
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    (tmp_path / "legacy").mkdir()
    stored = {k.removeprefix("transformer."): v for k, v in reference.state_dict().items()}
    stored["h.0.attn.bias"] = torch.ones(1)
    torch.save(stored, tmp_path / "legacy" / "pytorch_model.bin")
    for name in ("sharded", "legacy"):
        model = Transformer(a)
        load_weights(tmp_path / name, model)
        assert (model(tokens_for(a)) - expected).abs().max() < 1e-4


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"wte.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is damaged, or holds more than weights"):
        load_weights(tmp_path, Transformer(architecture()))
    assert not (tmp_path / "exploded").exists()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    reference_model(architecture()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"wte\.weight has shape"):
        load_weights(tmp_path, Transformer(architecture(vocab_size=98)))
    with pytest.raises(CheckpointError, match="are missing"):
        load_weights(tmp_path, Transformer(architecture(layers=3)))


def test_tied_embeddings_are_one_parameter() -> None:
    model = Transformer(architecture())
    assert model.head.projection.weight is model.embed.tokens.weight
    untied = Transformer(architecture(tie_embeddings=False))
    assert untied.head.projection.weight is not untied.embed.tokens.weight
    assert sum(p.numel() for p in untied.parameters()) == architecture(
        tie_embeddings=False
    ).parameter_count(padded=True)


def test_initialization_has_gpt2s_statistics() -> None:
    a = architecture(hidden_size=96, layers=8, vocab_size=500)
    model = Transformer(a)
    initialize(model, 0)
    block = model.blocks[3]
    assert block.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    expected = 0.02 / (2 * a.layers) ** 0.5
    assert block.mlp.down.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert block.attention.output.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert block.mlp.up.bias.abs().max() == 0
    assert (block.mlp_norm.weight == 1).all()
    assert model.embed.tokens.weight[a.vocab_size :].abs().max() == 0
    again = Transformer(a)
    initialize(again, 0)
    assert torch.equal(again.blocks[3].mlp.up.weight, block.mlp.up.weight)
    initialize(again, 1)
    assert not torch.equal(again.blocks[3].mlp.up.weight, block.mlp.up.weight)
