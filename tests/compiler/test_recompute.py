"""Recompute policies: every one gives the gradients of keeping everything, in its own memory."""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch

import penstock
from penstock.compiler.eager_recompute import recompute_eagerly
from penstock.compiler.executable import Executable
from penstock.compiler.memory import MemoryModel
from penstock.compiler.plan import Plan
from penstock.compiler.planner import make_plan
from penstock.compiler.runtime import attach
from penstock.config.load import load_config
from penstock.config.planning import PlanSection
from penstock.config.schema import BatchSection, ModelSection
from penstock.errors import ConfigError, ExecutableError
from penstock.hardware.target import load_target
from penstock.models.initialization import initialize
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer
from penstock.planning import follow_executable, plan_of
from tests.numerics import assert_matches

POLICIES = ("none", "selective", "blocks", "every-2", "every-3")


def model_of(preset: str = "gpt2-tiny", dropout: float = 0.0, layers: int = 3) -> Transformer:
    section = ModelSection(preset=preset, dropout=dropout, layers=layers)
    model = Transformer(resolve_architecture(section))
    initialize(model, 1)
    return model


def run(model: Transformer, rows: int = 4) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, 512, (rows, 64), generator=g) for _ in range(2))
    keys = model.dropout_keys(0, 5, torch.arange(rows))
    loss = model(tokens, targets, torch.full((rows, 64), 1 / (64 * rows)), keys)
    model.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.fixture(scope="module")
def keeping_executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's tiny executable, but for what its blocks keep: as graphs, which run without a
    compiler.
    """
    path = tmp_path_factory.mktemp("executable") / "keeping.penstock"
    penstock.compile(
        model={"preset": "gpt2-tiny"},
        batch={"micro": 4},
        data={"sequence_length": 64},
        precision={"compute": "fp32"},
        plan={"recompute": "none"},
        compile={"toolchain": "eager"},
        executable=path,
    )
    return path


@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_give_the_gradients_of_plain_autograd(
    policy: str, tiny_executable: Path, keeping_executable: Path
) -> None:
    executable = Executable.open(keeping_executable if policy == "none" else tiny_executable)
    loss, gradients = run(model_of())
    model = model_of()
    attach(model, executable.kernels(), recompute=policy)
    compiled_loss, compiled_gradients = run(model)
    assert_matches(compiled_loss, loss, 1e-5)
    for ours, theirs in zip(compiled_gradients, gradients, strict=True):
        assert_matches(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    ("preset", "pieces"), [("gpt2-tiny", 1), ("gpt2-tiny", 3), ("llama-tiny", 5)]
)
def test_pieces_of_the_loss_change_neither_it_nor_a_gradient(
    preset: str, pieces: int, tmp_path: Path
) -> None:
    # 256 tokens in 3 or 5 pieces: the last one is not full. One model has its table tied.
    penstock.compile(
        model={"preset": preset},
        batch={"micro": 4},
        data={"sequence_length": 64},
        precision={"compute": "fp32"},
        plan={"loss_chunks": pieces},
        compile={"toolchain": "eager"},
        executable=tmp_path / "x.penstock",
    )
    executable = Executable.open(tmp_path / "x.penstock")
    plain, model = model_of(preset), model_of(preset)
    attach(model, executable.kernels())
    loss, gradients = run(plain)
    same_loss, same_gradients = run(model)
    assert_matches(same_loss, loss, 1e-6)
    for ours, theirs in zip(same_gradients, gradients, strict=True):
        assert_matches(ours, theirs, 1e-5)
    tokens = torch.arange(256).view(4, 64)
    assert_matches(
        model.token_losses(tokens, tokens.flip(1)), plain.token_losses(tokens, tokens.flip(1)), 1e-6
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("preset", "dropout"), [("gpt2-tiny", 0.1), ("llama-tiny", 0.0)])
def test_without_kernels_no_policy_changes_a_bit(preset: str, dropout: float, policy: str) -> None:
    loss, gradients = run(model_of(preset, dropout))
    model = model_of(preset, dropout)
    recompute_eagerly(model, policy)
    same_loss, same_gradients = run(model)
    assert torch.equal(same_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(same_gradients, gradients, strict=True))


@pytest.mark.parametrize("policy", ["selective", "blocks", "every-2"])
@pytest.mark.parametrize("preset", ["gpt2-tiny", "pythia-tiny", "llama-tiny"])
def test_without_kernels_a_policy_keeps_what_is_predicted(preset: str, policy: str) -> None:
    architecture = model_of(preset).architecture
    memory = MemoryModel(
        architecture=architecture, micro=3, sequence_length=64, accumulation=1,
        compute="fp32", recompute=policy, loss_chunks=1, device="cpu", compiled=False,
    )  # fmt: skip
    predicted = [
        memory.stage(n, embedding=False, head=False, block_passes=n).device["activations"]
        for n in (2, 6)
    ]
    measured = [kept_bytes(preset, policy, layers) for layers in (2, 6)]
    # Left out: a scalar a block.
    assert measured[1] - measured[0] == pytest.approx(predicted[1] - predicted[0], abs=4 * 8)


def kept_bytes(preset: str, policy: str, layers: int) -> int:
    """What Python can see of the tensors that come to life in a forward pass of the blocks."""
    model = model_of(preset, layers=layers)
    recompute_eagerly(model, policy)
    x = torch.zeros(3, 64, model.architecture.hidden_size, requires_grad=True)
    is_rotary = model.architecture.positions == "rotary"
    turns = torch.ones(2, 1, 1, 64, model.architecture.rotary_size // 2) if is_rotary else None
    before = alive()
    for block in model.blocks:
        x = block(x, None, turns)
    return sum(size for address, size in alive().items() if address not in before)


def alive() -> dict[int, int]:
    """Bytes of every tensor's storage that Python can see, by address."""
    gc.collect()
    found = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    storages = [t.untyped_storage() for t in found if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_one_executable_serves_every_policy_that_keeps_products(tiny_executable: Path) -> None:
    executable = Executable.open(tiny_executable)
    for policy in ("selective", "blocks", "every-7"):
        executable.require(dataclasses.replace(executable.plan, recompute=policy))
    with pytest.raises(ExecutableError, match="kept=products, but .* kept=everything") as caught:
        executable.require(dataclasses.replace(executable.plan, recompute="none"))
    assert "plan.recompute=none" in str(caught.value)


def test_training_follows_the_executable_unless_told_otherwise(keeping_executable: Path) -> None:
    plan = Executable.open(keeping_executable).plan
    assert follow_executable(load_config(None).config, plan).plan.recompute == "none"
    given = load_config(None, ["plan.recompute=blocks"]).config
    assert follow_executable(given, plan).plan.recompute == "blocks"


def test_selective_is_the_default_with_kernels_and_none_without() -> None:
    words = ["model.preset=gpt2-tiny", "plan.target=zen5-2core"]
    for more, policy in ([], "selective"), (["compile.mode=off"], "none"):
        assert plan_of(load_config(None, words + more).config, None).recompute == policy


@pytest.mark.parametrize("policy", ["all", "every", "every-0", "every-2x", "Blocks", ""])
def test_a_policy_there_is_not_is_refused_in_one_line(policy: str) -> None:
    with pytest.raises(ConfigError, match="none, selective, blocks or every-N") as caught:
        load_config(None, [f"plan.recompute={policy}"])
    assert "plan.recompute" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_between_all_and_nothing_is_named_where_it_is_the_fastest_that_fits() -> None:
    architecture = resolve_architecture(ModelSection(preset="gpt2-xl"))
    target = load_target("a100-80gb")

    def decide(limit: int, recompute: str | None) -> Plan:
        return make_plan(
            architecture,
            batch=BatchSection(micro=1),
            plan=PlanSection(recompute=recompute),
            compute="bf16",
            sequence_length=1024,
            target=dataclasses.replace(target, device="cpu", memory_bytes=limit),
        )

    selective, every = (decide(1 << 50, policy) for policy in ("selective", "every-4"))
    between = (selective.memory["total"] + every.memory["total"]) // 2
    plan = decide(between, None)
    assert not plan.fits
    assert plan.advice[0].startswith("plan.recompute=every-4 fits")
    assert selective.step_seconds < every.step_seconds < decide(1 << 50, "blocks").step_seconds
