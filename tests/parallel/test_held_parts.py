"""A process makes, reads and resumes only its own stage of a model, with one process' bits."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.checkpoint import CheckpointState, load_newest, save_checkpoint
from penstock.config.schema import ModelSection
from penstock.jobs import base_model
from penstock.models.adapter import Adapter
from penstock.models.architecture import Architecture
from penstock.models.huggingface import save_weights
from penstock.models.initialization import held_parameters
from penstock.models.lora import sites_of
from penstock.models.resolve import resolve_architecture
from penstock.parallel.stage import Stage, holds, layers_of_pieces

PIECES = layers_of_pieces([2, 2], 2)
PRESETS = ("gpt2-tiny", "llama-tiny")


def sections(preset: str, folder: Path) -> tuple[Architecture, list[ModelSection]]:
    """A model drawn from a seed, and the same read from a folder in the Hugging Face layout."""
    drawn = ModelSection.model_validate({"preset": preset, "layers": 4})
    architecture = resolve_architecture(drawn, 300)
    whole = base_model(drawn, architecture, 7, torch.float32)
    weights = {name: p.detach() for name, p in whole.named_parameters()}
    save_weights(folder, weights, architecture, tokenizer=None, end_of_text=0)
    return architecture, [drawn, ModelSection.model_validate({"from": str(folder)})]


def of_process(rank: int, is_tied: bool) -> Callable[[str], bool]:
    return partial(holds, pieces=PIECES, own=(rank, rank + 2), is_tied=is_tied)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_process_makes_the_weights_it_holds_and_no_others(preset: str, tmp_path: Path) -> None:
    architecture, both = sections(preset, tmp_path)
    for section in both:
        whole = dict(base_model(section, architecture, 7, torch.float32).named_parameters())
        found: list[str] = []
        for rank in (0, 1):
            own = of_process(rank, architecture.tie_embeddings)
            model = base_model(section, architecture, 7, torch.float32, own)
            held = dict(held_parameters(model))
            assert all(torch.equal(held[name], whole[name]) for name in held)
            stages = [Stage(model, PIECES, index, 0.0) for index in (rank, rank + 2)]
            assert {name for s in stages for name, _ in s.named_parameters()} == held.keys()
            found += held
        assert sorted({*found}) == sorted(whole)
        assert len(found) - len(whole) == architecture.tie_embeddings


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_base_in_few_bits_is_packed_by_those_who_hold_it(base: str, tmp_path: Path) -> None:
    architecture, both = sections("gpt2-tiny", tmp_path)
    sites = tuple(site for site, _ in sites_of(architecture))
    adapter = Adapter(2, 4.0, 0.0, sites, base=base)
    architecture = dataclasses.replace(architecture, adapter=adapter)
    for section in both:
        whole = base_model(section, architecture, 7, torch.bfloat16)
        model = base_model(section, architecture, 7, torch.bfloat16, of_process(1, is_tied=True))
        one: Any
        other: Any
        for index, (one, other) in enumerate(zip(model.blocks, whole.blocks, strict=True)):
            if index in PIECES[1] or index in PIECES[3]:
                assert torch.equal(one.mlp.up.codes, other.mlp.up.codes)
            else:
                assert one.mlp.up.codes is None


def test_only_a_stage_s_tensors_are_read_from_a_checkpoint(tmp_path: Path) -> None:
    names = ["embed.tokens.weight", "blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"]
    names += ["head.norm.weight"]
    kinds = ("master", "exp_avg")
    tensors = {f"{kind}.{name}": torch.randn(3, 2) for kind in kinds for name in names}
    save_checkpoint(tmp_path / "checkpoints", CheckpointState(1, tensors, {}))
    for rank, own in enumerate((names[:2], [names[0], *names[2:]])):
        state = load_newest(tmp_path / "checkpoints", wanted=of_process(rank, is_tied=True))
        assert state is not None
        assert state.tensors.keys() == {f"{kind}.{name}" for kind in kinds for name in own}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in state.tensors.items())
