"""Checkpoints that are not what they should be: everything that is wrong, in one line."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from penstock.config.schema import ModelSection
from penstock.errors import CheckpointError, ConfigError
from penstock.models.resolve import resolve_architecture
from tests.models.family_cases import CASES, ours_in


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_config(CASES["llama"]())
    model.save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({n: t.clone() for n, t in tensors.items() if t is not None}, path, {"format": "pt"})


def test_all_that_is_wrong_is_listed(llama: Path) -> None:
    first = "model.layers.0.self_attn"
    changes = {
        f"{first}.q_proj.weight": None,
        f"{first}.k_proj.weight": None,
        "model.norm.weight": torch.ones(7),
        "model.extra.weight": torch.ones(3),
    }
    change(llama, changes)
    with pytest.raises(CheckpointError) as caught:
        ours_in(llama)
    line = str(caught.value)
    assert "model.norm.weight has shape [7], the model [48]" in line
    assert f"{first}.q_proj.weight, {first}.k_proj.weight are missing" in line
    assert "model.extra.weight has no place in the model" in line
    assert "\n" not in line


def test_long_lists_are_cut(llama: Path) -> None:
    names = [name for name in load_file(llama / "model.safetensors") if ".layers.1." in name]
    change(llama, dict.fromkeys(names))
    with pytest.raises(CheckpointError, match=rf"and {len(names) - 4} more are missing"):
        ours_in(llama)


def test_a_model_of_another_family_than_asked_for_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="is a model of family llama, not gpt2"):
        resolve_architecture(ModelSection.model_validate({"from": str(llama), "family": "gpt2"}))
    with pytest.raises(ConfigError, match="llama-tiny is a model of family llama, not gptj"):
        resolve_architecture(ModelSection(preset="llama-tiny", family="gptj"))
    right = resolve_architecture(ModelSection(preset="llama-tiny", family="llama"))
    assert right == resolve_architecture(ModelSection(preset="llama-tiny"))
    assert resolve_architecture(ModelSection()).family == "gpt2"


def test_another_familys_weights_beside_a_config_are_told(llama: Path, tmp_path: Path) -> None:
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=48, n_head=3, n_positions=40, vocab_size=97)
    )
    other = tmp_path / "other"
    gpt2.save_pretrained(other)
    (other / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"are missing; .* have no place in the model"):
        ours_in(other)
