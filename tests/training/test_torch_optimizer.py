"""Optimizers of torch against torch itself, and what ours adds: masters, clipping, skipping, state."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from penstock.config.schema import OptimizerSection
from penstock.errors import CheckpointError
from penstock.training.gradient_norm import global_norm
from penstock.training.muon import Muon
from penstock.training.optimizer import AdamW
from penstock.training.optimizers import make_optimizer
from penstock.training.parameter_groups import learning_rate_shares
from penstock.training.torch_optimizer import TorchOptimizer
from tests.training.test_optimizer import DECAYED, SHAPES, make_parameters, set_gradients

NAMES = ["sgd", "rmsprop", "adagrad", "adadelta", "adamax", "nadam", "radam", "adafactor"]
REFERENCES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, **o: torch.optim.SGD(p, momentum=0.95, **o),
    "rmsprop": lambda p, **o: torch.optim.RMSprop(p, alpha=0.99, **o),
    "adagrad": lambda p, **o: torch.optim.Adagrad(p, eps=1e-8, **o),
    "adadelta": lambda p, **o: torch.optim.Adadelta(p, rho=0.99, eps=1e-8, **o),
    "adamax": lambda p, **o: torch.optim.Adamax(p, betas=(0.9, 0.99), **o),
    "nadam": lambda p, **o: torch.optim.NAdam(p, betas=(0.9, 0.99), **o),
    "radam": lambda p, **o: torch.optim.RAdam(p, betas=(0.9, 0.99), **o),
    "adafactor": torch.optim.Adafactor,
}
DECOUPLED = {name: {"decoupled_weight_decay": True} for name in ("nadam", "radam")}


def section(name: str, **fields: object) -> OptimizerSection:
    return OptimizerSection(name=name, **{"betas": (0.9, 0.99), "lr": 1e-2, **fields})


@pytest.mark.parametrize("name", NAMES)
def test_ten_fp32_steps_equal_torchs(name: str) -> None:
    # These can decouple the decay; the others are compared without (Adafactor decays later).
    decay = 0.1 if name in DECOUPLED else 0.0
    settings = section(name, weight_decay=decay, clip=None)
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer = make_optimizer(ours.items(), settings)
    groups = [
        {"params": [p for n, p in theirs.items() if (n in DECAYED) is decays],
         "weight_decay": decay if decays else 0.0}
        for decays in (True, False)
    ]  # fmt: skip
    reference = REFERENCES[name](groups, lr=1e-2, **DECOUPLED.get(name, {}))
    start = make_parameters(torch.float32)
    for step in range(10):
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
        optimizer.step(1e-2)
        reference.step()
    for parameter in SHAPES:
        torch.testing.assert_close(ours[parameter], theirs[parameter], rtol=1e-5, atol=1e-6)
        assert not torch.equal(ours[parameter], start[parameter])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_saved_state_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    settings = section(name, clip=1.0)
    whole, first, second = (make_parameters(dtype) for _ in range(3))
    one, two = make_optimizer(whole.items(), settings), make_optimizer(first.items(), settings)

    def advance(optimizer: TorchOptimizer, parameters: dict[str, Parameter], step: int) -> None:
        set_gradients(parameters, step)
        norm = global_norm(optimizer.gradients())
        optimizer.step(1e-2, grad_norm=norm, skip=torch.tensor(step == 2))

    for step in range(8):
        advance(one, whole, step)
        if step < 4:
            advance(two, first, step)
    saved = {name: value.clone().contiguous() for name, value in two.state_tensors().items()}
    three = make_optimizer(second.items(), settings)
    three.load_state_tensors(saved)
    three.steps = two.steps
    assert two.steps == 3  # one was skipped
    for step in range(4, 8):
        advance(three, second, step)
    assert all(torch.equal(whole[n], second[n]) for n in whole)
    a, b = one.state_tensors(), three.state_tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_decay_is_decoupled_and_spares_norms() -> None:
    parameters = make_parameters(torch.float32)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = make_optimizer(parameters.items(), section("sgd", weight_decay=0.5, lr=0.1))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, value in parameters.items():
        factor = 0.95 if name in DECAYED else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor)


@pytest.mark.parametrize("change", ["missing", "left", "shape"])
def test_state_that_does_not_fit_changes_nothing(change: str) -> None:
    parameters = make_parameters(torch.float32)
    optimizer = make_optimizer(parameters.items(), section("adagrad"))
    set_gradients(parameters, 0)
    optimizer.step(1e-2)
    state = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    name = "sum.blocks.0.mlp.up.bias"
    if change == "missing":
        del state[name]
    elif change == "left":
        state["sum.blocks.9.mlp.up.bias"] = state[name]
    else:
        state[name] = state[name][:-1]
    before = {n: v.clone() for n, v in optimizer.state_tensors().items()}
    with pytest.raises(CheckpointError, match=r"does not fit: sum\.blocks"):
        optimizer.load_state_tensors(state)
    after = optimizer.state_tensors()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_each_layer_has_its_share_of_the_learning_rate() -> None:
    names = ["embed.tokens.weight", *(f"blocks.{i}.mlp.up.weight" for i in range(12)), "head.norm"]
    shares = learning_rate_shares(names, 0.5)
    assert shares["head.norm"] == 1
    assert shares["blocks.11.mlp.up.weight"] == 0.5
    assert shares["blocks.0.mlp.up.weight"] == 0.5**12
    assert shares["embed.tokens.weight"] == 0.5**13
    assert set(learning_rate_shares(names, 1.0).values()) == {1.0}


LAYERED = {
    "embed.tokens.weight": (40, 8), "blocks.0.mlp.up.weight": (16, 8), "blocks.0.mlp.up.bias": (16,),
    "blocks.1.mlp.up.weight": (16, 8), "blocks.1.mlp.up.bias": (16,), "head.norm.weight": (8,),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_with_layer_decay_equals_torchs_with_a_rate_for_each_layer(
    dtype: torch.dtype,
) -> None:
    settings = OptimizerSection(lr=1e-2, weight_decay=0.1, clip=None, layer_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    start = {n: torch.randn(s, generator=generator).to(dtype) for n, s in LAYERED.items()}
    ours = {name: Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: Parameter(value.float()) for name, value in start.items()}
    shares = {"embed": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "head": 1.0}
    reference = torch.optim.AdamW(
        [
            {"params": [p], "lr": 1e-2 * next(v for k, v in shares.items() if name.startswith(k)),
             "weight_decay": 0.1 if name.endswith("up.weight") else 0.0}
            for name, p in theirs.items()
        ],
        betas=settings.betas, eps=settings.eps,
    )  # fmt: skip
    optimizer = AdamW(ours.items(), settings, group_bytes=4 * 50)
    for step in range(10):
        set_gradients(ours, step)
        for name, parameter in theirs.items():
            parameter.grad = ours[name].grad.float()
        optimizer.step(1e-2)
        reference.step()
    masters = optimizer.state_tensors()
    for name, value in theirs.items():
        torch.testing.assert_close(masters[f"master.{name}"], value.detach(), rtol=1e-5, atol=1e-6)


def test_muon_moves_each_layer_by_its_share() -> None:
    moved = {}
    for decay in (1.0, 0.5):
        generator = torch.Generator().manual_seed(0)
        parameters = {n: Parameter(torch.randn(s, generator=generator)) for n, s in LAYERED.items()}
        before = {name: value.detach().clone() for name, value in parameters.items()}
        options = OptimizerSection(name="muon", weight_decay=0, clip=None, layer_decay=decay)
        optimizer = Muon(parameters.items(), options)
        set_gradients(parameters, 0)
        optimizer.step(1e-2)
        moved[decay] = {n: float((p.detach() - before[n]).norm()) for n, p in parameters.items()}
    for name, share in {"blocks.0.mlp.up.weight": 0.25, "blocks.1.mlp.up.weight": 0.5}.items():
        assert moved[0.5][name] == pytest.approx(share * moved[1.0][name], rel=1e-4)
