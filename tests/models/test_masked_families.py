"""Every masked family against `transformers`: logits, gradients, padding, folders both ways."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from penstock.config.schema import ModelSection
from penstock.errors import CheckpointError, UserError
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES
from penstock.models.huggingface import to_stored
from penstock.models.initialization import initialize
from penstock.models.resolve import read_hf_config, resolve_architecture
from penstock.models.transformer import Transformer
from tests.models.family_cases import check_export, gradients_beside, ours_from, ours_in
from tests.models.masked_cases import CASES, reference_model, tokens_for
from tests.numerics import assert_matches

FAMILY_NAMES = sorted({case.split()[0] for case in CASES})


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (3, 33) with a part that is padding, and where it is not."""
    tokens, mask = tokens_for(), torch.ones(3, 33, dtype=torch.int64)
    mask[1, 20:] = 0
    mask[2, 7:] = 0
    return tokens, mask


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str, tmp_path: Path) -> None:
    reference = reference_model(case)
    model = ours_from(reference, tmp_path)
    tokens, mask = padded()
    tokens = torch.where(mask.bool(), tokens, reference.config.pad_token_id)
    chosen = (torch.rand(3, 33, generator=torch.Generator().manual_seed(2)) < 0.3) & mask.bool()
    theirs = reference(tokens, attention_mask=mask, labels=torch.where(chosen, tokens, -100))
    segments = mask - 1
    logits = model(tokens, segments=segments)
    assert (logits - theirs.logits)[mask.bool()].abs().max() < 1e-4
    weights = chosen.float() / chosen.sum()
    loss = model(tokens, tokens, weights, segments=segments)
    assert abs(loss.item() - theirs.loss.item()) < 1e-5
    theirs.loss.backward()
    loss.backward()
    for name, part, expected in gradients_beside(model, reference):
        if "key.bias" in name or "k_lin.bias" in name:
            # It moves all scores of a query alike: nothing but rounding.
            assert part.abs().max() < 1e-6
            continue
        wanted = expected
        if "word_embeddings" in name or "position_embeddings" in name:
            # What is computed of padding differs, and `transformers` drops its rows' gradients.
            row = torch.tensor([reference.config.pad_token_id])
            wanted = expected.index_fill(0, row, 0)
            part.index_fill_(0, row, 0)
        assert_matches(part, wanted, 1e-4)
        assert (part - wanted).abs().max() < 1e-4, name


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_no_logits(case: str, tmp_path: Path) -> None:
    model = ours_from(reference_model(case), tmp_path)
    tokens, mask = padded()
    logits = model(tokens, segments=mask - 1)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(tokens[row : row + 1, :length])[0]
        assert_matches(logits[row, :length], alone, 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_exported_folders_load_in_transformers_and_come_back(case: str, tmp_path: Path) -> None:
    first = ours_from(reference_model(case), tmp_path / "theirs")
    check_export(first, transformers.AutoModelForMaskedLM, tokens_for(), tmp_path / "ours")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_sharded_and_legacy_files_load(family: str, tmp_path: Path) -> None:
    reference = reference_model(family)
    expected = reference(tokens_for()).logits
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert (ours_in(tmp_path)(tokens_for()) - expected).abs().max() < 1e-4
    for path in tmp_path.glob("model*"):
        path.unlink()
    # With what published files have besides: tied weights twice, a pooler, old names of norms.
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = reference.state_dict()
    for new, former in names.items():
        old = {name.replace(new, former): value for name, value in old.items()}
    old |= {f"{family}.pooler.dense.weight": torch.zeros(2, 2)}
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert (ours_in(tmp_path)(tokens_for()) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("damage", ["weight", "heads", "position", "epsilon", "head"])
def test_the_comparison_rejects_a_wrong_model(case: str, damage: str, tmp_path: Path) -> None:
    reference = reference_model(case)
    model = ours_from(reference, tmp_path)
    tokens = tokens_for()
    with torch.no_grad():
        if damage == "weight":
            model.blocks[1].mlp.up.weight.mul_(1.003)
        elif damage == "heads":
            weight = model.blocks[0].attention.query_key_value.weight
            weight[:32] = weight[:32].roll(16, 0)
        elif damage == "position":
            model.embed.offset += 1
        elif damage == "epsilon":
            model.blocks[0].attention_norm.epsilon += 1e-2
        else:
            model.head.transform.weight.mul_(1.01)
        error = (model(tokens) - reference(tokens).logits).abs().max()
    assert error > 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bert", {"hidden_act": "mish"}, "hidden_act=mish is not supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key is not supported"),
        ("bert", {"is_decoder": True}, "is_decoder=True is not supported"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act=relu is not RoBERTa's"),
        ("albert", {"num_hidden_groups": 2}, "num_hidden_groups=2 is not supported"),
        ("distilbert", {"n_heads": 5}, "model.heads=5 does not divide model.hidden_size=48"),
    ],
)
def test_settings_that_would_change_the_result_are_one_clear_line(
    family: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    CASES[family]().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError) as caught:
        resolve_architecture(ModelSection.model_validate({"from": str(tmp_path)}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_dropout_rates_are_read_and_written_apart(family: str, tmp_path: Path) -> None:
    names = {"distilbert": ("dropout", "attention_dropout")}
    hidden, attention = names.get(family, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    CASES[family]().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), hidden: 0.2, attention: 0.0}))
    a = resolve_architecture(ModelSection.model_validate({"from": str(tmp_path)}))
    assert (a.dropout, a.embedding_rate, a.attention_rate) == (0.2, 0.2, 0.0)
    written = FAMILIES[family].to_hf_config(a, None)
    assert (written[hidden], written[attention]) == (0.2, 0.0)


def test_a_missing_part_of_the_head_is_named(tmp_path: Path) -> None:
    reference_model("bert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["cls.predictions.transform.dense.weight"]
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.transform\.dense\.weight is"):
        ours_in(tmp_path)


PRESETS = [name for family in FAMILY_NAMES for name in FAMILIES[family].PRESETS]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_parameters_transformers_counts(preset: str) -> None:
    a = resolve_architecture(ModelSection(preset=preset))
    config = transformers.AutoConfig.for_model(**FAMILIES[a.family].to_hf_config(a, None))
    with torch.device("meta"):
        theirs = transformers.AutoModelForMaskedLM.from_config(config)
        ours = Transformer(a)
    assert a.parameter_count() == theirs.num_parameters()
    assert a.parameter_count(padded=True) == sum(p.numel() for p in ours.parameters())
    assert a.embedding_parameters(padded=True) == sum(p.numel() for p in ours.embed.parameters())
    assert a.head_parameters(padded=True) == sum(p.numel() for p in ours.head.parameters())
    assert a.block_parameters() == sum(p.numel() for p in ours.blocks[0].parameters())
    # Everything but what is looked up, shared layers as often as they run.
    looked_up = [ours.embed.positions, ours.embed.token_types]
    tables = sum(p.numel() for m in looked_up if m is not None for p in m.parameters())
    again = (a.layers - a.distinct_blocks(a.layers)) * a.block_parameters()
    multiplied = a.parameter_count() - tables + again
    assert a.flops_per_token(100) == 6 * multiplied + 12 * a.layers * a.hidden_size * 100


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_initialization_has_the_familys_statistics(family: str, tmp_path: Path) -> None:
    config = CASES[family]()
    config.save_pretrained(tmp_path)
    _, fields = read_hf_config(tmp_path)
    larger = {"hidden_size": 4 * fields["hidden_size"], "mlp_size": 400, "vocab_size": 970}
    a = Architecture(family=family, **{**fields, **larger, "max_positions": 400})
    model = Transformer(a)
    initialize(model, 0)
    config = transformers.AutoConfig.for_model(**FAMILIES[family].to_hf_config(a, None))
    theirs = transformers.AutoModelForMaskedLM.from_config(config)
    for name, place in FAMILIES[family].hf_names(a).items():
        ours = model.get_parameter(name)
        rows = a.vocab_size if ours.shape[0] == a.padded_vocab_size else None
        for their_name, part in to_stored(place, ours.detach()[:rows]).items():
            expected = theirs.get_parameter(their_name)
            # Eight standard errors of the mean and of the standard deviation.
            count = math.sqrt(part.numel())
            near = pytest.approx(expected.mean().item(), abs=8 * 0.02 / count)
            assert part.mean().item() == near
            spread = pytest.approx(expected.std().item(), rel=8 / count, abs=1e-9)
            assert part.std().item() == spread
