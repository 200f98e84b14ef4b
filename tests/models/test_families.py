"""Every family against `transformers`: logits, gradients, folders both ways, generated ids."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from penstock.config.schema import ModelSection
from penstock.errors import CheckpointError, UserError
from penstock.inference.decoding import EagerDecoder
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES
from penstock.models.huggingface import to_stored
from penstock.models.initialization import initialize
from penstock.models.resolve import read_hf_config, resolve_architecture
from penstock.models.transformer import Transformer
from tests.models.family_cases import (
    CASES,
    check_export,
    gradients_beside,
    ours_from,
    ours_in,
    reference_model,
    tokens_for,
)
from tests.numerics import assert_matches


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str, tmp_path: Path) -> None:
    reference = reference_model(case)
    model = ours_from(reference, tmp_path)
    tokens = tokens_for()
    theirs = reference(tokens, labels=tokens)
    assert (model(tokens) - theirs.logits).abs().max() < 1e-4
    weights = torch.full((tokens.shape[0], tokens.shape[1] - 1), 1.0)
    loss = model(tokens[:, :-1], tokens[:, 1:], weights / weights.sum())
    assert abs(loss.item() - theirs.loss.item()) < 1e-5
    theirs.loss.backward()
    loss.backward()
    for name, part, expected in gradients_beside(model, reference):
        assert_matches(part, expected, 1e-4)
        assert (part - expected).abs().max() < 1e-4, name


@pytest.mark.parametrize("case", CASES)
def test_exported_folders_load_in_transformers_and_come_back(case: str, tmp_path: Path) -> None:
    first = ours_from(reference_model(case), tmp_path / "theirs")
    check_export(first, transformers.AutoModelForCausalLM, tokens_for(), tmp_path / "ours")


@pytest.mark.parametrize("family", sorted({case.split()[0] for case in CASES}))
def test_sharded_and_legacy_files_load(family: str, tmp_path: Path) -> None:
    reference = reference_model(family)
    expected = reference(tokens_for()).logits
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert (ours_in(tmp_path)(tokens_for()) - expected).abs().max() < 1e-4
    for path in tmp_path.glob("model*"):
        path.unlink()
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    assert (ours_in(tmp_path)(tokens_for()) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [[33], [20, 13], [30, 1, 1, 1]])
def test_decoding_in_pieces_equals_the_full_forward_pass(
    case: str, pieces: list[int], tmp_path: Path
) -> None:
    model = ours_from(reference_model(case), tmp_path)
    tokens = tokens_for()
    decoder = EagerDecoder(model)
    decoder.begin(torch.zeros(len(tokens), dtype=torch.int64), 33)
    whole = model(tokens)
    start = 0
    for size in pieces:
        end = start + size
        assert_matches(decoder.extend(tokens[:, start:end]), whole[:, end - 1], 1e-5)
        start = end


@pytest.mark.parametrize("case", CASES)
def test_left_padding_changes_no_logits(case: str, tmp_path: Path) -> None:
    model = ours_from(reference_model(case), tmp_path)
    tokens, padding = tokens_for(length=12), torch.tensor([0, 5, 10])
    decoder = EagerDecoder(model)
    decoder.begin(padding, 13)
    first, second = decoder.extend(tokens[:, :11]), decoder.extend(tokens[:, 11:])
    for row, count in enumerate(padding.tolist()):
        alone = model(tokens[row : row + 1, count:])[0]
        assert_matches(first[row], alone[-2], 1e-5)
        assert_matches(second[row], alone[-1], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_equal_transformers(case: str, tmp_path: Path) -> None:
    reference = reference_model(case)
    decoder = EagerDecoder(ours_from(reference, tmp_path))
    ids = tokens_for(rows=1, length=7)
    expected = reference.generate(
        ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    decoder.begin(torch.zeros(1, dtype=torch.int64), 27)
    new = decoder.extend(ids).argmax(-1, keepdim=True)
    while ids.shape[1] < 27:
        ids = torch.cat([ids, new], 1)
        new = decoder.extend(new).argmax(-1, keepdim=True)
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("damage", ["weight", "heads", "position", "epsilon"])
def test_the_comparison_rejects_a_wrong_model(case: str, damage: str, tmp_path: Path) -> None:
    reference = reference_model(case)
    model = ours_from(reference, tmp_path)
    tokens = tokens_for()
    with torch.no_grad():
        if damage == "weight":
            model.blocks[1].mlp.up.weight.mul_(1.001)
        elif damage == "heads":
            weight = model.blocks[0].attention.query_key_value.weight
            weight[:32] = weight[:32].roll(16, 0)
        elif damage == "position":
            model.architecture = Architecture(
                **{**vars(model.architecture), "rotary_base": model.architecture.rotary_base * 2}
            )
        else:
            model.blocks[0].attention_norm.epsilon *= 100
        error = (model(tokens) - reference(tokens).logits).abs().max()
    assert error > 1e-4


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.bias"),
        ("gptj", "transformer.h.0.attn.v_proj.weight"),
        ("llama", "model.layers.1.self_attn.k_proj.weight"),
    ],
)
def test_missing_and_misshapen_parts_are_named(family: str, name: str, tmp_path: Path) -> None:
    reference_model(family).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    part = tensors.pop(name)
    for changed, message in (
        ({}, f"{name} is missing"),
        ({name: part[:-1]}, f"{name} has shape {[len(part) - 1, *part.shape[1:]]}, the model"),
        ({name: part, "lm_head.more": part.clone()}, "more has no place in the model"),
    ):
        whole = {key: value.contiguous() for key, value in (tensors | changed).items()}
        safetensors.torch.save_file(whole, path)
        with pytest.raises(CheckpointError) as caught:
            ours_in(tmp_path)
        assert message in str(caught.value)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    reference_model("gptj").save_pretrained(tmp_path)
    CASES["llama"]().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight, .* are missing"):
        ours_in(tmp_path)


REFUSED = [
    ("gpt_neox", {"hidden_act": "gelu_10"}, "hidden_act=gelu_10 is not supported"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias=False is not supported"),
    ("gpt_neox", {"rotary_pct": 0.2}, "rotates 3 elements of each head's 16: not pairs"),
    ("gpt_neox", {"hidden_size": 50}, "model.heads=3 does not divide model.hidden_size=50"),
    ("gptj", {"rotary_dim": None}, "rotary_dim=None is not supported"),
    ("gptj", {"rotary_dim": 7}, "not pairs"),
    ("gptj", {"activation_function": "mish"}, "activation_function=mish is not supported"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic is not"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type=yarn is not"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ("llama", {"head_dim": 16}, "head_dim=16 is not hidden_size / num_attention_heads"),
    ("llama", {"num_key_value_heads": 4}, "model.kv_heads=4 does not divide model.heads=6"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not Llama's"),
    ("llama", {"hidden_act": "quick_gelu"}, "hidden_act=quick_gelu is not supported"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_settings_that_would_change_the_result_are_one_clear_line(
    family: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    # Keys as published configurations have them, from before version 5 of `transformers`.
    _, fields = read_hf_config(saved_config(family, tmp_path))
    values = FAMILIES[family].to_hf_config(Architecture(family=family, **fields), None)
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(UserError) as caught:
        resolve_architecture(ModelSection.model_validate({"from": str(tmp_path)}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def saved_config(family: str, folder: Path) -> Path:
    """A folder with the config.json that `transformers` writes for the family's plain case."""
    CASES[family]().save_pretrained(folder)
    return folder


def test_keys_of_version_4_and_of_version_5_mean_the_same(tmp_path: Path) -> None:
    for case in CASES:
        CASES[case]().save_pretrained(tmp_path)
        family, fields = read_hf_config(tmp_path)
        a = Architecture(family=family, **fields)
        older = FAMILIES[family].to_hf_config(a, None)
        assert "rope_parameters" not in older
        assert Architecture(family=family, **FAMILIES[family].from_hf_config(older)) == a


def test_a_heads_rotated_elements_survive_any_head_size() -> None:
    values = FAMILIES["gptj"].to_hf_config(Architecture(**gptj_tiny()), None)
    for head_size in range(2, 200):
        for rotated in range(2, head_size + 1, 2):
            changed = {**values, "n_embd": head_size, "n_head": 1, "rotary_dim": rotated}
            fields = FAMILIES["gptj"].from_hf_config(changed)
            assert Architecture(family="gptj", **fields).rotary_size == rotated


def gptj_tiny() -> dict[str, object]:
    """Fields of the tiny GPT-J."""
    return {"family": "gptj", "mlp_size": 256, **FAMILIES["gptj"].PRESETS["gpt-j-tiny"]}


def all_presets() -> list[str]:
    causal = (m.PRESETS for m in FAMILIES.values())  # masked ones: test_masked_families.py
    return [name for presets in causal for name, v in presets.items() if v.get("is_causal", True)]


@pytest.mark.parametrize("preset", all_presets())
def test_presets_have_the_parameters_transformers_counts(preset: str, tmp_path: Path) -> None:
    family = next(name for name, m in FAMILIES.items() if preset in m.PRESETS)
    fields = dict(FAMILIES[family].PRESETS[preset])
    fields.setdefault("mlp_size", 4 * fields["hidden_size"])
    a = Architecture(family=family, **fields)
    values = FAMILIES[family].to_hf_config(a, None)
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        theirs, ours = transformers.AutoModelForCausalLM.from_config(config), Transformer(a)
    assert a.parameter_count() == sum(p.numel() for p in theirs.parameters())
    assert a.parameter_count(padded=True) == sum(p.numel() for p in ours.parameters())
    assert a.block_parameters() == sum(p.numel() for p in ours.blocks[0].parameters())
    looked_up = [theirs.get_input_embeddings()] if not a.tie_embeddings else []
    looked_up += [m for name, m in theirs.named_modules() if name.endswith("wpe")]
    multiplied = a.parameter_count() - sum(p.numel() for m in looked_up for p in m.parameters())
    attention = 12 * a.layers * a.hidden_size * 100
    assert a.flops_per_token(100) == 6 * multiplied + attention
    matrices = [p.numel() for p in ours.blocks[0].parameters() if p.dim() == 2]
    assert a.block_matrix_elements() == sum(matrices)


@pytest.mark.parametrize("family", sorted({case.split()[0] for case in CASES}))
def test_initialization_has_the_familys_statistics(family: str, tmp_path: Path) -> None:
    reference_model(family).config.save_pretrained(tmp_path)
    _, fields = read_hf_config(tmp_path)
    larger = {"hidden_size": 4 * fields["hidden_size"], "mlp_size": 400}
    a = Architecture(family=family, **{**fields, **larger})
    model = Transformer(a)
    initialize(model, 0)
    config = transformers.AutoConfig.for_model(**FAMILIES[family].to_hf_config(a, None))
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for name, place in FAMILIES[family].hf_names(a).items():
        ours = model.get_parameter(name)
        rows = a.vocab_size if ours.shape[0] == a.padded_vocab_size else None
        for their_name, part in to_stored(place, ours.detach()[:rows]).items():
            expected = theirs.get_parameter(their_name.replace("embed_out", "lm_head"))
            assert part.mean().item() == pytest.approx(expected.mean().item(), abs=1e-3)
            assert part.std().item() == pytest.approx(expected.std().item(), rel=0.05, abs=1e-9)
