"""Families through kernels: compiled training and generation equal the eager model's numbers."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import penstock
from penstock.compiler.executable import Executable
from penstock.compiler.plan import Plan
from penstock.compiler.planner import make_plan
from penstock.compiler.regions import trace_kernel
from penstock.compiler.runtime import attach
from penstock.config.schema import BatchSection, ModelSection, PlanSection
from penstock.hardware.target import load_target
from penstock.inference.decoding import CompiledDecoder, EagerDecoder
from penstock.models.initialization import initialize
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer
from tests.numerics import assert_matches

# One in every run; the others take half a minute each.
TINY = [
    "llama-tiny",
    pytest.param("pythia-tiny", marks=pytest.mark.slow),
    pytest.param("gpt-j-tiny", marks=pytest.mark.slow),
]
MASKED = [
    pytest.param("albert-tiny", marks=pytest.mark.slow),
    pytest.param("roberta-tiny", marks=pytest.mark.slow),
    pytest.param("bert-tiny", marks=pytest.mark.slow),
    pytest.param("distilbert-tiny", marks=pytest.mark.slow),
]


def model_for(executable: Executable, layers: int = 2) -> Transformer:
    """Weights far from zero, biases and norms included."""
    model = Transformer(dataclasses.replace(executable.plan.architecture, layers=layers))
    initialize(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def run(model: Transformer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, 512, (3, 48), generator=g) for _ in range(2))
    weights = torch.rand(3, 48, generator=g)
    keys = model.dropout_keys(0, 5, torch.arange(3))
    loss = model(tokens, targets, weights / weights.sum(), keys, torch.tensor(1e-3))
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def compiled(tmp_path: Path, preset: str, **settings: object) -> Executable:
    path = tmp_path / "family.penstock"
    penstock.compile(
        model={"preset": preset},
        precision={"compute": "fp32"},
        executable=path,
        **settings,
    )
    return Executable.open(path)


@pytest.mark.parametrize("preset", [*TINY, *MASKED])
def test_compiled_training_equals_eager(preset: str, tmp_path: Path) -> None:
    executable = compiled(
        tmp_path, preset, batch={"micro": 3}, data={"sequence_length": 48}, plan={"loss_chunks": 2}
    )
    for layers, recompute in ((2, "selective"), (3, "blocks"), (3, "every-2")):
        eager, model = model_for(executable, layers), model_for(executable, layers)
        loss, gradients = run(eager)
        attach(model, executable.kernels(), recompute=recompute)
        compiled_loss, compiled_gradients = run(model)
        assert_matches(compiled_loss, loss, 1e-5)
        for ours, theirs in zip(compiled_gradients, gradients, strict=True):
            assert_matches(ours, theirs, 1e-4)
        tokens = torch.arange(3 * 48).view(3, 48) % 512
        expected = eager.token_losses(tokens, tokens.roll(1, 1))
        assert_matches(model.token_losses(tokens, tokens.roll(1, 1)), expected, 1e-5)


@pytest.mark.slow
def test_compiled_dropout_drops_what_eager_drops(tmp_path: Path) -> None:
    path = tmp_path / "dropout.penstock"
    penstock.compile(
        model={"preset": "llama-tiny", "dropout": 0.1},
        precision={"compute": "fp32"},
        batch={"micro": 3},
        data={"sequence_length": 48},
        executable=path,
    )
    executable = Executable.open(path)
    loss, gradients = run(model_for(executable))
    model = model_for(executable)
    attach(model, executable.kernels())
    compiled_loss, compiled_gradients = run(model)
    assert_matches(compiled_loss, loss, 1e-5)
    for ours, theirs in zip(compiled_gradients, gradients, strict=True):
        assert_matches(ours, theirs, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("preset", TINY)
def test_compiled_decoding_equals_eager(preset: str, tmp_path: Path) -> None:
    executable = compiled(
        tmp_path, preset, mode="generate", generate={"batch": 2}, compile={"toolchain": "inductor"}
    )
    model = model_for(executable).requires_grad_(False)
    shapes = executable.plan.generation_shapes()
    decoders = EagerDecoder(model), CompiledDecoder(model, executable.kernels(), shapes)
    generator = torch.Generator().manual_seed(3)
    for padding, pieces, capacity in (
        ([0], [1, 1, 1], 10),  # token by token
        ([0], [5, 1, 1], 20),  # a prompt shorter than a chunk
        ([0, 3], [33, 1, 20, 1], 60),  # chunks that overlap
        ([7, 0], [63, 1], 64),  # to the last place
    ):
        for decoder in decoders:
            decoder.begin(torch.tensor(padding), capacity)
        for size in pieces:
            tokens = torch.randint(0, 512, (len(padding), size), generator=generator)
            expected, actual = (decoder.extend(tokens) for decoder in decoders)
            assert_matches(actual, expected, 1e-4)


def plan_for(preset: str, compute: str, dropout: float) -> Plan:
    return make_plan(
        resolve_architecture(ModelSection(preset=preset, dropout=dropout)),
        batch=BatchSection(micro=3),
        plan=PlanSection(),
        compute=compute,
        sequence_length=48,
        target=load_target("zen5-2core"),
    )


@pytest.mark.parametrize("preset", ["gpt2-tiny", "pythia-tiny", "gpt-j-tiny", "llama-tiny"])
@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_what_a_traced_block_keeps_is_what_is_predicted(preset: str, compute: str) -> None:
    plan = plan_for(preset, compute, 0.0)
    # Traced on fake tensors, as the compiler does it: nothing is allocated.
    traced = trace_kernel(plan, "block_forward")
    kept = traced.graph.outputs[traced.contract.output_count :]
    block_input = traced.graph.outputs[0]
    size = sum(math.prod(t.shape) * t.element_size() for t in (*kept, block_input))
    assert plan.memory["activations"] == plan.architecture.layers * size


@pytest.mark.parametrize("preset", ["bert-large", "roberta-large", "distilbert-base"])
def test_masked_presets_are_planned(preset: str) -> None:
    plan = dataclasses.replace(plan_for(preset, "bf16", 0.0))
    assert plan.takes_segments
    assert plan.memory["weights"] == 2 * plan.architecture.parameter_count(padded=True)
    assert plan.fits


@pytest.mark.parametrize("preset", ["llama-3-8b", "llama-2-70b", "gpt-j-6b", "pythia-12b"])
def test_large_presets_are_planned_without_weights(preset: str) -> None:
    architecture = resolve_architecture(ModelSection(preset=preset))
    plan = make_plan(
        architecture,
        batch=BatchSection(micro=1),
        plan=PlanSection(),
        compute="bf16",
        sequence_length=2048,
        target=load_target("h100"),
    )
    assert plan.memory["weights"] == 2 * architecture.parameter_count(padded=True)
    assert not plan.fits


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny"])
def test_compiled_packed_documents_equal_eager(preset: str, tmp_path: Path) -> None:
    executable = compiled(
        tmp_path,
        preset,
        batch={"micro": 3},
        data={"sequence_length": 48, "attention": "document"},
    )
    eager, model = model_for(executable), model_for(executable)
    attach(model, executable.kernels(), recompute="none")
    g = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, 512, (3, 48), generator=g) for _ in range(2))
    segments = (torch.rand(3, 48, generator=g) > 0.8).cumsum(1)
    segments[2, 40:] = -1
    losses = [m(tokens, targets, segments=segments) for m in (eager, model)]
    for loss in losses:
        loss.backward()
    assert_matches(losses[1], losses[0], 1e-5)
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert_matches(ours.grad, theirs.grad, 1e-4)
    expected = eager.token_losses(tokens, targets, segments)
    assert_matches(model.token_losses(tokens, targets, segments), expected, 1e-5)
    assert not torch.allclose(expected, eager.token_losses(tokens, targets))
