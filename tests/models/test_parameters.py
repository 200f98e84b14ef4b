"""Sizes of parameters without torch against the modules', and what patterns freeze."""

import dataclasses

import pytest
import torch

from penstock.config.schema import ModelSection
from penstock.errors import ConfigError
from penstock.models.families import FAMILIES, PRESETS
from penstock.models.parameters import Frozen, count_frozen, frozen_names, parameter_sizes
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_the_module(family: str, tied: bool) -> None:
    sizes = {"layers": 2, "hidden_size": 48, "heads": 3, "mlp_size": 100, "vocab_size": 97}
    section = ModelSection(family=family, tie_embeddings=tied, kv_heads=1, **sizes)
    architecture = resolve_architecture(section)
    with torch.device("meta"):
        model = Transformer(architecture)
    expected = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert parameter_sizes(architecture) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_add_up_to_the_parameter_count(preset: str) -> None:
    architecture = resolve_architecture(ModelSection(preset=preset))
    assert sum(parameter_sizes(architecture).values()) == architecture.parameter_count(padded=True)


def test_patterns_freeze_what_they_match() -> None:
    architecture = resolve_architecture(ModelSection(preset="gpt2"))
    assert count_frozen(architecture, []) == Frozen()
    found = count_frozen(architecture, ["embed.*", "blocks.[0-3].*"])
    tables = architecture.padded_vocab_size * 768 + 1024 * 768
    assert found == Frozen(embedding=tables, blocks=4 * architecture.block_parameters())
    untied = dataclasses.replace(architecture, tie_embeddings=False)
    head = count_frozen(untied, ["head.*"]).head
    assert head == architecture.padded_vocab_size * 768 + 2 * 768
    names = list(parameter_sizes(architecture))
    assert frozen_names(names, ["*.bias"]) == {name for name in names if name.endswith(".bias")}


def test_patterns_that_freeze_nothing_or_everything_are_refused() -> None:
    names = list(parameter_sizes(resolve_architecture(ModelSection(preset="gpt2-tiny"))))
    with pytest.raises(ConfigError, match=r"no parameter is named embd\.\*") as caught:
        frozen_names(names, ["embd.*"])
    assert "embed." in str(caught.value)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        frozen_names(names, ["*"])
