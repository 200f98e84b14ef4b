"""AdamW with moments of eight bits: near AdamW's, exact to resume, and refused without its library."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import penstock
from penstock.compiler.memory import MemoryModel
from penstock.config.schema import ModelSection, OptimizerSection
from penstock.errors import CheckpointError, ConfigError
from penstock.models.initialization import initialize
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer
from penstock.training.adamw_8bit import AdamW8bit
from penstock.training.optimizer import AdamW


def parameters(dtype: torch.dtype) -> list[tuple[str, Parameter]]:
    g = torch.Generator().manual_seed(3)
    # Larger than a piece, and no multiple of a block; and one whose moments stay float32.
    shapes = {"blocks.0.weight": (1100, 1001), "blocks.0.bias": (1001,)}
    return [(n, Parameter(torch.randn(s, generator=g).to(dtype))) for n, s in shapes.items()]


def gradients(step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=g) for _, p in parameters(torch.float32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_near_those_with_moments_of_32_bits(dtype: torch.dtype) -> None:
    section = OptimizerSection(clip=1.0)
    ours, exact = AdamW8bit(parameters(dtype), section), AdamW(parameters(dtype), section)
    start = {name: value.clone() for name, value in exact.state_tensors().items()}
    for step in range(10):
        given = gradients(step)
        norm = torch.stack([g.norm() for g in given]).norm()
        ours.step(1e-3, grad_norm=norm, gradients=given)
        exact.step(1e-3, grad_norm=norm, gradients=[g.clone() for g in given])
    for name, relative in (("blocks.0.weight", 0.03), ("blocks.0.bias", 1e-5)):
        master = exact.state_tensors()[f"master.{name}"]
        moved = master - start[f"master.{name}"]
        error = ours.state_tensors()[f"master.{name}"] - master
        assert error.norm() < relative * moved.norm()
        assert (name == "blocks.0.bias") == (
            ours.state_tensors()[f"exp_avg.{name}"].dtype != torch.uint8
        )


def test_resuming_changes_no_bit_and_another_optimizers_state_is_refused() -> None:
    section = OptimizerSection()
    straight = AdamW8bit(parameters(torch.bfloat16), section)
    for step in range(3):
        straight.step(1e-3, gradients=gradients(step))
    kept = {name: value.clone() for name, value in straight.state_tensors().items()}
    resumed = AdamW8bit(parameters(torch.bfloat16), section)
    resumed.load_state_tensors(kept)
    resumed.steps = straight.steps
    for optimizer in (straight, resumed):
        for step in range(3, 6):
            optimizer.step(1e-3, gradients=gradients(step))
    for name, value in straight.state_tensors().items():
        assert torch.equal(value, resumed.state_tensors()[name])
    plain = AdamW(parameters(torch.bfloat16), section)
    with pytest.raises(CheckpointError, match="does not fit"):
        resumed.load_state_tensors(plain.state_tensors())


def test_a_skipped_step_changes_nothing() -> None:
    optimizer = AdamW8bit(parameters(torch.bfloat16), OptimizerSection())
    before = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    optimizer.step(1e-3, skip=torch.tensor(True), gradients=gradients(0))
    assert optimizer.steps == 0
    assert all(torch.equal(v, before[n]) for n, v in optimizer.state_tensors().items())


def test_state_takes_the_bytes_that_are_predicted() -> None:
    architecture = resolve_architecture(ModelSection(preset="gpt2-tiny", hidden_size=256))
    model = Transformer(architecture).bfloat16()
    state = AdamW8bit(model.named_parameters(), OptimizerSection()).state_tensors()
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    memory = MemoryModel(
        architecture=architecture, micro=1, sequence_length=8, accumulation=1, compute="bf16",
        recompute="selective", loss_chunks=1, device="cpu", optimizer="adamw_8bit",
    )  # fmt: skip
    stage = memory.stage(architecture.layers, embedding=True, head=True, block_passes=1)
    assert stage.device["optimizer"] == pytest.approx(held, rel=0.02)


def test_training_reaches_the_loss_of_32_bits() -> None:
    def losses(kind: type[AdamW]) -> list[float]:
        model = Transformer(resolve_architecture(ModelSection(preset="gpt2-tiny", layers=1)))
        initialize(model, 0)
        optimizer = kind(model.named_parameters(), OptimizerSection(lr=3e-3))
        generator = torch.Generator().manual_seed(1)
        # Text in which each token has four successors: its entropy is log 4 = 1.386 nats.
        successors = torch.randint(0, 512, (512, 4), generator=generator)
        found: list[float] = []
        for _ in range(200):
            rows = [torch.randint(0, 512, (32,), generator=generator)]
            for choice in torch.randint(0, 4, (8, 32), generator=generator):
                rows.append(successors[rows[-1], choice])
            tokens = torch.stack(rows, 1)
            loss = model(tokens[:, :-1], tokens[:, 1:], torch.full((32, 8), 1 / 256))
            loss.backward()
            optimizer.step(3e-3, grad_norm=torch.tensor(1.0))
            optimizer.zero_gradients()
            found.append(loss.item())
        return found

    exact, ours = losses(AdamW), losses(AdamW8bit)
    mean = [sum(found[-20:]) / 20 for found in (exact, ours)]
    assert mean[0] < exact[0] - 1
    assert abs(mean[1] - mean[0]) < 0.01 * mean[0]


def test_a_run_killed_and_resumed_is_the_run_never_stopped(
    tiny_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    def train(name: str, steps: int) -> dict[str, torch.Tensor]:
        from penstock.checkpoint import load_newest

        penstock.train(
            executable=tiny_executable, data={"path": dataset_folder}, run=tmp_path / name,
            optimizer={"name": "adamw_8bit"}, schedule={"name": "constant"},
            train={"steps": steps, "report": False, "tensorboard": False},
        )  # fmt: skip
        found = load_newest(tmp_path / name / "checkpoints")
        assert found is not None
        return found.tensors

    straight = train("straight", 4)
    train("stopped", 2)
    resumed = train("stopped", 4)
    assert any(tensor.dtype == torch.uint8 for tensor in straight.values())
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*pip install 'penstock\[8bit\]'"):
        AdamW8bit(parameters(torch.float32), OptimizerSection())
