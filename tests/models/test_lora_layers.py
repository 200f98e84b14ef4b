"""Adapters against `peft` itself, in every family: logits, gradients, files in and out."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from penstock.config.lora import LoraSection
from penstock.errors import CheckpointError, ConfigError
from penstock.models.architecture import Architecture
from penstock.models.huggingface import load_weights
from penstock.models.initialization import initialize
from penstock.models.lora import adapted, sites_of
from penstock.models.peft_format import read_adapter, write_adapter
from penstock.models.projection import is_trained, merge_adapters
from penstock.models.resolve import read_hf_config
from penstock.models.transformer import Transformer
from tests.models import masked_cases
from tests.models.family_cases import CASES
from tests.models.masked_cases import tokens_for

GPT2 = {"n_layer": 2, "n_embd": 48, "n_head": 3, "n_positions": 40, "vocab_size": 97}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1),
    **{name: CASES[name] for name in ("gpt_neox", "gptj", "llama")},
}
MASKED = {name: masked_cases.CASES[name] for name in ("bert", "roberta", "distilbert", "albert")}
FAMILIES |= MASKED
TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "bert": ["query", "attention.output.dense"],
    "roberta": ["key", "intermediate.dense"],
    "distilbert": ["q_lin", "out_lin", "lin2"],
    "albert": ["query", "value", "ffn"],
}


def kind_of(family: str) -> type:
    return (
        transformers.AutoModelForMaskedLM if family in MASKED else transformers.AutoModelForCausalLM
    )


def base_and_peft(
    family: str, folder: Path, **settings: object
) -> tuple[transformers.PreTrainedModel, peft.PeftModel]:
    """A base model in FOLDER/base, and the same under an adapter saved in FOLDER/adapter."""
    torch.manual_seed(5)
    base = kind_of(family).from_config(FAMILIES[family]()).eval().float()
    base.save_pretrained(folder / "base")
    # PEFT's all-linear of a masked model has layers of its head too.
    targets = TARGETS[family] if family in MASKED else "all-linear"
    options = {"r": 3, "lora_alpha": 12, "target_modules": targets, **settings}
    task = None if family in MASKED else "CAUSAL_LM"
    model = peft.get_peft_model(base, peft.LoraConfig(task_type=task, **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter")
    return base, model


def ours(folder: Path, section: LoraSection | None = None) -> Transformer:
    family, fields = read_hf_config(folder / "base")
    section = section or LoraSection(from_=str(folder / "adapter"))
    architecture = adapted(Architecture(family=family, **fields), section)
    model = Transformer(architecture)
    load_weights(folder / "base", model)
    if section.from_ is not None:
        values = read_adapter(folder / "adapter", architecture)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", None])
def test_logits_equal_pefts_and_merging_changes_nothing(
    family: str, targets: str | None, tmp_path: Path
) -> None:
    chosen = targets if targets and family not in MASKED else TARGETS.get(family)
    _, theirs = base_and_peft(family, tmp_path, target_modules=chosen, use_rslora=not targets)
    model, tokens = ours(tmp_path), tokens_for()
    expected = theirs(tokens).logits
    with theirs.disable_adapter():
        assert (theirs(tokens).logits - expected).abs().max() > 1e-2  # the adapter does something
    assert (model(tokens) - expected).abs().max() < 1e-4
    merge_adapters(model)
    assert not any("adapters" in name for name, _ in model.named_parameters())
    assert (model(tokens) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_pefts(family: str, tmp_path: Path) -> None:
    _, theirs = base_and_peft(family, tmp_path)
    model, tokens = ours(tmp_path), tokens_for()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(model.architecture, name))
    theirs(tokens, labels=tokens).loss.backward()
    if family in MASKED:
        model(tokens, tokens).div(tokens.numel()).backward()
    else:
        model(tokens[:, :-1], tokens[:, 1:]).div(tokens[:, 1:].numel()).backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    written = tmp_path / "gradients"
    write_adapter(written, mine, model.architecture, None)
    from safetensors.torch import load_file

    stored = load_file(written / "adapter_model.safetensors")
    reference = {
        name.replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert stored.keys() == reference.keys()
    largest = max(float(value.abs().max()) for value in reference.values())
    assert largest > 1e-3
    for name, value in reference.items():
        assert (stored[name] - value).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize(
    ("family", "targets"),
    [("gpt2", ["mlp.c_proj"]), ("gpt2", []), ("gpt_neox", ["all-linear"]), ("gptj", []),
     ("llama", []), ("llama", ["k_proj", "mlp.up"]), ("bert", []), ("albert", ["query"]),
     ("distilbert", ["lin1"]), ("roberta", ["all-linear"])],
)  # fmt: skip
def test_peft_loads_what_we_write_with_the_same_logits(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    base_and_peft(family, tmp_path)
    base = kind_of(family).from_pretrained(tmp_path / "base").eval()
    model = ours(tmp_path, LoraSection(rank=2, targets=targets, dropout=0.25))
    start = model(tokens_for())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    weights = {n: p.detach() for n, p in model.named_parameters() if ".adapters." in n}
    write_adapter(tmp_path / "out", weights, model.architecture, str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    expected = theirs(tokens_for()).logits
    assert (model(tokens_for()) - expected).abs().max() < 1e-4
    assert (start - expected).abs().max() > 1e-3
    sites = model.architecture.adapter.sites
    loaded = [n for n, _ in theirs.named_parameters() if "lora_A" in n]
    a = model.architecture
    assert len(loaded) == len(sites) * a.distinct_blocks(a.layers)
    task = None if family in MASKED else "CAUSAL_LM"
    assert theirs.peft_config["default"].task_type == task
    assert theirs.peft_config["default"].lora_dropout == 0.25
    # And back again, equal to the bit.
    again = read_adapter(tmp_path / "out", model.architecture)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_training_starts_from_the_model_as_it_is(tmp_path: Path) -> None:
    base_and_peft("llama", tmp_path)
    section = LoraSection(rank=4, targets=["all-linear"])
    family, fields = read_hf_config(tmp_path / "base")
    architecture = adapted(Architecture(family=family, **fields), section)
    one, plain = Transformer(architecture), Transformer(Architecture(family=family, **fields))
    initialize(one, 0)
    initialize(plain, 0)
    assert torch.equal(one(tokens_for()), plain(tokens_for()))
    downs = [p for n, p in one.named_parameters() if n.endswith(".down")]
    assert all(0.9 < p.abs().max() * p.shape[1] ** 0.5 <= 1 for p in downs)
    trained = sum(p.numel() for n, p in one.named_parameters() if is_trained(architecture, n))
    assert trained == architecture.trained_parameters()


def gpt2() -> Architecture:
    return Architecture(
        family="gpt2", layers=2, hidden_size=48, heads=3, mlp_size=192, max_positions=40,
        vocab_size=97,
    )  # fmt: skip


def test_a_target_that_does_not_exist_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no block has a linear layer c_atn") as caught:
        adapted(gpt2(), LoraSection(rank=4, targets=["c_atn"]))
    assert "use c_attn" in str(caught.value)
    with pytest.raises(ConfigError, match="use c_attn, c_proj, c_fc, or all-linear"):
        adapted(gpt2(), LoraSection(rank=4, targets=["xyzzy"]))


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora.alpha is set, but there are no adapters"):
        adapted(gpt2(), LoraSection(alpha=8))
    with pytest.raises(ConfigError, match="lora.rank and lora.from are both given"):
        adapted(gpt2(), LoraSection(rank=8, from_=str(tmp_path)))
    assert adapted(gpt2(), LoraSection()) == gpt2()


def test_names_mean_what_they_mean_to_peft() -> None:
    sites = [site for site, _ in sites_of(gpt2())]
    assert [site.name for site in sites] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    both = adapted(gpt2(), LoraSection(rank=1, targets=["c_proj"])).adapter.sites
    assert [site.name for site in both] == ["attn.c_proj", "mlp.c_proj"]
    mine = adapted(gpt2(), LoraSection(rank=1, targets=["attention.output"])).adapter.sites
    assert [site.name for site in mine] == ["attn.c_proj"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"peft_type": "IA3"}, "its peft_type is IA3, not LORA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'. is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa has changed"),
        ({"r": 0}, "r=0 and"),
        ({"r": "x"}, "its r and lora_alpha are missing"),
        ({"r": 4}, "has shape .3, 48., not .4, 48."),
    ],
)
def test_adapters_that_cannot_be_used_are_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    base_and_peft("gpt2", tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        ours(tmp_path)


def test_damaged_and_foreign_adapters_are_refused(tmp_path: Path) -> None:
    base_and_peft("gpt2", tmp_path)
    (tmp_path / "llama").mkdir()
    base_and_peft("llama", tmp_path / "llama")
    section = LoraSection(from_=str(tmp_path / "llama" / "adapter"))
    with pytest.raises(CheckpointError, match="it has no adapters for a model of family gpt2"):
        adapted(gpt2(), section)
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json"):
        adapted(gpt2(), LoraSection(from_=str(tmp_path)))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors cannot be read"):
        ours(tmp_path)
