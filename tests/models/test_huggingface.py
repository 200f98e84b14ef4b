"""Folders in the Hugging Face layout: what comes back, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import transformers

from penstock.errors import CheckpointError
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES
from penstock.models.huggingface import load_model, load_weights, save_weights
from penstock.models.initialization import initialize
from penstock.models.resolve import read_hf_config
from penstock.models.transformer import Transformer
from tests.models.test_parity import architecture, tokens_for


def save(folder: Path, a: Architecture, seed: int = 3) -> Transformer:
    model = Transformer(a)
    initialize(model, seed)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_weights(folder, weights, a, tokenizer=None, end_of_text=0)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_our_own_folders_come_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    a = architecture(tie_embeddings=tied)
    model = save(tmp_path, a)
    again = Transformer(a)
    load_weights(tmp_path, again)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_untied_exports_load_in_transformers(tmp_path: Path) -> None:
    a = architecture(tie_embeddings=False)
    model = save(tmp_path, a)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.lm_head.weight is not theirs.transformer.wte.weight
    tokens = tokens_for(a)
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_every_size_survives_an_export(tmp_path: Path) -> None:
    a = architecture(norm_epsilon=1e-3, mlp_size=100, layers=3, tie_embeddings=False)
    model = save(tmp_path, a)
    family, fields = read_hf_config(tmp_path)
    assert Architecture(family=family, **fields) == a
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = tokens_for(a)
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_files_hold_no_padding_and_say_what_they_are(tmp_path: Path) -> None:
    a = architecture()
    save(tmp_path, a)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("transformer.wte.weight").get_shape() == [a.vocab_size, 48]
        assert "lm_head.weight" not in set(file.keys())
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 0
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.bin", "..", ""])
def test_an_index_cannot_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    a = architecture()
    save(tmp_path, a)
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        load_weights(folder, Transformer(a))


@pytest.mark.parametrize("value", [[1], {}, {"weight_map": None}, {"weight_map": [1]}])
def test_an_index_without_names_is_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="names no files"):
        load_weights(tmp_path, Transformer(architecture()))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["empty", "junk", "half", "flipped header"])
def test_damaged_files_are_one_line_naming_the_file(name: str, damage: str, tmp_path: Path) -> None:
    a = architecture()
    model = save(tmp_path, a)
    path = tmp_path / name
    if name.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(dict(model.state_dict()), path)
    whole = path.read_bytes()
    flipped = bytes(byte ^ 0xFF for byte in whole[:200]) + whole[200:]
    content = {"empty": b"", "junk": b"\x80\x02junk", "half": whole[: len(whole) // 2]}
    path.write_bytes(content.get(damage, flipped))
    with pytest.raises(CheckpointError, match=name) as caught:
        load_weights(tmp_path, Transformer(a))
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_and_left_over_tensors_are_refused(tmp_path: Path) -> None:
    a = architecture()
    with pytest.raises(CheckpointError, match="neither"):
        load_weights(tmp_path, Transformer(a))
    save(tmp_path, a)
    with pytest.raises(CheckpointError, match=r"h\.1.* have no place in the model"):
        load_weights(tmp_path, Transformer(architecture(layers=1)))


def test_a_list_of_tensors_is_not_a_checkpoint(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(tmp_path, Transformer(architecture()))


def test_weights_load_into_a_model_of_another_format(tmp_path: Path) -> None:
    a = architecture()
    model = save(tmp_path, a)
    narrow = Transformer(a).to(torch.bfloat16)
    load_weights(tmp_path, narrow)
    for ours, theirs in zip(narrow.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16))


_MEASURE = """
import re, sys, torch
from pathlib import Path
from penstock.hardware.process import prepare_process
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES
from penstock.models.huggingface import load_model
from penstock.models.resolve import read_hf_config

prepare_process()
# Of this program alone: getrusage counts what its parent had in memory when it started it.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
family, fields = read_hf_config(Path(sys.argv[1]))
a = Architecture(family=family, **fields)
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before = peak()
model = load_model(Path(sys.argv[1]), a, "cpu", getattr(torch, sys.argv[2]))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(weights, (peak() - before) / weights)
"""


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt2", "bfloat16"), ("gpt_neox", "bfloat16"), ("llama", "float32")]
)
def test_loading_needs_little_more_memory_than_the_weights(
    family: str, dtype: str, tmp_path: Path
) -> None:
    fields = dict(next(iter(FAMILIES[family].PRESETS.values())))
    sizes = {"layers": 16, "hidden_size": 512, "heads": 8, "kv_heads": None, "mlp_size": 2048}
    a = Architecture(family=family, **{**fields, **sizes, "vocab_size": 512, "max_positions": 512})
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(a).named_parameters()}
    # Not random: the measured process only has to touch every byte.
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_weights(tmp_path, weights, a, tokenizer=None, end_of_text=0)
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), dtype],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    size, ratio = map(float, run.stdout.split())
    assert size == a.parameter_count(padded=True) * (4 if dtype == "float32" else 2)
    assert 0.9 < ratio <= 1.15


@pytest.mark.parametrize("tied", [True, False])
def test_models_made_without_memory_have_the_weights_and_the_tie(
    tied: bool, tmp_path: Path
) -> None:
    a = architecture(tie_embeddings=tied)
    model = save(tmp_path, a)
    loaded = load_model(tmp_path, a, "cpu", torch.float32)
    assert (loaded.head.projection.weight is loaded.embed.tokens.weight) == tied
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert theirs.requires_grad


def test_a_hub_name_is_found_in_the_hubs_cache(tmp_path: Path) -> None:
    """The layout huggingface_hub keeps: snapshots by revision, refs naming one."""
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60, resid_pdrop=0.25)
    )
    model.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = (
        "import sys; from penstock.config.schema import ModelSection;"
        "from penstock.models.resolve import resolve_architecture;"
        "a = resolve_architecture(ModelSection(**{'from': sys.argv[1]}));"
        "print(a.hidden_size, a.vocab_size, a.dropout)"
    )
    offline = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name, expected in (("someone/tiny", "32 60 0.25"), ("someone/other", "neither a folder")):
        run = subprocess.run(
            [sys.executable, "-c", code, name],
            check=False, capture_output=True, text=True, env={**os.environ, **offline},
        )  # fmt: skip
        assert expected in run.stdout + run.stderr
