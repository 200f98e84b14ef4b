"""Kernels of divided blocks compute what the parts do without them."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

import penstock
from penstock.compiler.executable import Executable
from penstock.compiler.planner import make_plan
from penstock.compiler.runtime import attach
from penstock.compiler.split_regions import trace_part
from penstock.config.schema import BatchSection, ModelSection, PlanSection
from penstock.errors import ExecutableError
from penstock.hardware.target import load_target
from penstock.models.resolve import resolve_architecture
from penstock.models.split_block import SplitBlock, split_blocks
from penstock.models.transformer import Transformer
from tests.compiler.test_family_kernels import model_for, run

# One in every run, the others take as long again each.
PRESETS = [
    "gpt2-tiny",
    pytest.param("llama-tiny", marks=pytest.mark.slow),
    pytest.param("gpt-j-tiny", marks=pytest.mark.slow),
    pytest.param("bert-tiny", marks=pytest.mark.slow),
]


class Alone:
    """Where one part meets nobody."""

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return x


def compiled(folder: Path, preset: str, **more: object) -> Executable:
    path = folder / f"{preset}.penstock"
    penstock.compile(
        **{
            "model": {"preset": preset, "dropout": 0.1},
            "batch": {"micro": 3},
            "data": {"sequence_length": 48},
            "precision": {"compute": "fp32"},
            "plan": {"tensor": 2},
            "compile": {"toolchain": "eager"},
            "executable": path,
            **more,
        }
    )
    return Executable.open(path)


def part_of(executable: Executable) -> Transformer:
    model = model_for(executable)
    split_blocks(model, 1, 2)
    for block in model.blocks:
        assert isinstance(block, SplitBlock)
        block.meeting = Alone()
    return model


def assert_same_step(executable: Executable, recompute: str) -> None:
    plain = part_of(executable)
    fast = copy.deepcopy(plain)
    attach(fast, executable.kernels(), recompute=recompute)
    expected, found = run(plain), run(fast)
    assert torch.allclose(found[0], expected[0], rtol=1e-5)
    for gradient, reference in zip(found[1], expected[1], strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-3, atol=1e-5)
    tokens = torch.arange(3 * 48).view(3, 48)
    losses = [model.token_losses(tokens, tokens) for model in (fast, plain)]
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_parts_through_kernels_step_as_without(preset: str, tmp_path: Path) -> None:
    executable = compiled(tmp_path, preset)
    for recompute in ("selective", "blocks"):
        assert_same_step(executable, recompute)


@pytest.mark.slow
def test_parts_through_machine_code_step_as_without(tmp_path: Path) -> None:
    executable = compiled(tmp_path, "llama-tiny", compile={"toolchain": "inductor"})
    assert_same_step(executable, "selective")


def test_kernels_of_parts_are_not_those_of_whole_blocks(tmp_path: Path) -> None:
    executable = compiled(tmp_path, "gpt2-tiny")
    assert "plan.tensor=2" in executable.rebuild_command(executable.plan)
    with pytest.raises(ExecutableError, match=r"compiled for tensor=2, but this job has tensor="):
        executable.require(dataclasses.replace(executable.plan, tensor=1))


@pytest.mark.parametrize(
    ("preset", "dropout", "recompute"),
    [
        ("gpt2-tiny", 0.1, "selective"),
        ("gpt-j-tiny", 0.0, "selective"),
        ("llama-tiny", 0.0, "none"),
    ],
)
def test_what_traced_parts_keep_is_what_is_predicted(
    preset: str, dropout: float, recompute: str
) -> None:
    plan = make_plan(
        resolve_architecture(ModelSection(preset=preset, dropout=dropout)),
        batch=BatchSection(micro=3),
        plan=PlanSection(recompute=recompute, tensor=2),
        compute="fp32",
        sequence_length=48,
        target=load_target("zen5-2core"),
    )
    names = ["attend", "feed", *(["attended", "fed"] if dropout else [])]
    inputs: set[str] = set()
    size = 0
    for name in names:
        forward, backward = (trace_part(plan, f"{name}_{part}") for part in ("forward", "backward"))
        size += sum(t.numel() * t.element_size() for t in forward.graph.outputs[1:])
        stream = len(forward.contract.parameters)
        if stream in backward.contract.kept_inputs:
            # A parallel block's halves read the same.
            inputs.add("x" if plan.architecture.residual != "sequential" else name)
    size += len(inputs) * 4 * 3 * 48 * plan.architecture.hidden_size
    assert plan.memory["activations"] == plan.architecture.layers * size
