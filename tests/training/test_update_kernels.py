"""The optimizer's kernels, against a float64 closed form and the graphs that describe them."""

import math
import shutil
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from penstock.compiler import update
from penstock.compiler.kernels import Kernel, KernelSpec, TensorSpec
from penstock.compiler.portable import read_graph, write_graph
from penstock.compiler.toolchains import find_toolchain
from penstock.compiler.update_graphs import trace_update
from penstock.config.schema import OptimizerSection
from penstock.errors import ExecutableError
from penstock.training.gradient_norm import global_norm
from penstock.training.muon import Muon
from penstock.training.optimizer import AdamW
from tests.training.test_optimizer import closed_form, make_parameters, set_gradients

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)


class Counted:
    """A kernel, and how often it was called: torch's update would pass these tests as well."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.calls = kernel, 0

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self.calls += 1
        return self.kernel(inputs)


@pytest.fixture
def kernels(loaded: dict[str, Kernel]) -> dict[str, Counted]:
    return {name: Counted(kernel) for name, kernel in loaded.items()}


@pytest.fixture(scope="module")
def loaded() -> dict[str, Kernel]:
    code = update.build_update()
    made: dict[str, Kernel] = {}
    for name in update.KERNELS:
        tensors, changed = update.kernel_tensors(name)
        inputs = tuple(TensorSpec.contiguous(dtype, shape) for dtype, shape in tensors)
        spec = KernelSpec(name, inputs, tuple(inputs[index] for index in changed))
        made[name] = Kernel(spec, code, find_toolchain("inductor"))
    return made


def trained_with(
    kernels: dict[str, Counted], parameters: dict[str, Parameter], section: OptimizerSection
) -> AdamW:
    optimizer = AdamW(parameters.items(), section)
    optimizer.use_kernels(kernels["adamw"], kernels["squares"])
    return optimizer


@pytest.mark.parametrize("clip", [None, 0.5])
def test_updates_follow_the_float64_closed_form(
    kernels: dict[str, Counted], clip: float | None
) -> None:
    section = OptimizerSection(lr=2e-3, clip=clip)
    parameters = make_parameters(torch.bfloat16)
    start = {name: value.detach().float() for name, value in parameters.items()}
    optimizer = trained_with(kernels, parameters, section)
    history: list[dict[str, Tensor]] = []
    for step in range(20):
        set_gradients(parameters, step)
        history.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
        norm = global_norm(optimizer.gradients(), squares=optimizer.squares)
        optimizer.step(section.lr, grad_norm=norm)
    assert [kernels[name].calls for name in update.KERNELS] == [20 * len(parameters)] * 2
    expected, state = closed_form(start, history, section), optimizer.state_tensors()
    assert optimizer.steps == 20
    for name, parameter in parameters.items():
        master = state[f"master.{name}"]
        torch.testing.assert_close(master.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(parameter.detach(), master.bfloat16())


def test_layers_have_their_shares_of_the_rate(kernels: dict[str, Counted]) -> None:
    section = OptimizerSection(layer_decay=0.5)
    ours, theirs = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16)
    pair = trained_with(kernels, ours, section), AdamW(theirs.items(), section)
    for step in range(3):
        for parameters, optimizer in zip((ours, theirs), pair, strict=True):
            set_gradients(parameters, step)
            optimizer.step(1e-2)
    assert kernels["adamw"].calls == 3 * len(ours)
    states = [optimizer.state_tensors() for optimizer in pair]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-7)


def test_a_skipped_step_changes_nothing_and_going_on_is_bit_identical(
    kernels: dict[str, Counted],
) -> None:
    section = OptimizerSection()
    first, second = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16, seed=9)
    undisturbed = trained_with(kernels, first, section)
    for step in range(4):
        set_gradients(first, step)
        undisturbed.step(1e-3)
    saved = {name: value.clone() for name, value in undisturbed.state_tensors().items()}
    for parameter in first.values():
        parameter.grad = torch.full_like(parameter, math.nan)
    norm = global_norm(undisturbed.gradients(), squares=undisturbed.squares)
    undisturbed.step(1e-3, grad_norm=norm, skip=~torch.isfinite(norm))
    assert undisturbed.steps == 4
    assert kernels["adamw"].calls == 4 * len(first)
    assert all(torch.equal(v, saved[n]) for n, v in undisturbed.state_tensors().items())
    resumed = trained_with(kernels, second, section)
    resumed.load_state_tensors(saved)
    resumed.steps = 4
    for parameters, optimizer in ((first, undisturbed), (second, resumed)):
        set_gradients(parameters, 4)
        optimizer.step(1e-3)
    for name, value in undisturbed.state_tensors().items():
        assert torch.equal(value, resumed.state_tensors()[name]), name


def test_float32_sums_of_gradients_are_taken_without_them(kernels: dict[str, Counted]) -> None:
    first, second = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16)
    section = OptimizerSection()
    one, two = trained_with(kernels, first, section), AdamW(second.items(), section)
    set_gradients(first, 0)
    sums = [gradient.float() / 3 for gradient in one.gradients()]
    for optimizer in (one, two):
        norm = global_norm(sums, squares=optimizer.squares)
        optimizer.step(1e-3, grad_norm=norm, gradients=[value.clone() for value in sums])
    assert [kernels[name].calls for name in update.KERNELS] == [0, 0]
    for name, value in one.state_tensors().items():
        assert torch.equal(value, two.state_tensors()[name]), name


def test_muon_gives_its_adamw_the_kernels(kernels: dict[str, Counted]) -> None:
    states = []
    for uses in (False, True):
        parameters = make_parameters(torch.bfloat16)
        optimizer = Muon(parameters.items(), OptimizerSection(name="muon"))
        if uses:
            optimizer.use_kernels(kernels["adamw"], kernels["squares"])
        set_gradients(parameters, 0)
        optimizer.step(1e-3)
        states.append(dict(optimizer.state_tensors()))
    assert 0 < kernels["adamw"].calls < len(make_parameters(torch.bfloat16))  # not the matrices
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-7)


def test_the_norm_of_millions_of_gradients_is_exact(kernels: dict[str, Counted]) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (5_000_003, 1024, 7, 1_048_576)
    gradients = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    exact = sum(float((g.double() ** 2).sum()) for g in gradients) ** 0.5
    norm = global_norm(gradients, squares=kernels["squares"])
    assert float(norm) == pytest.approx(exact, rel=1e-7)
    for bad in (math.nan, math.inf):
        gradients[0][4_999_999] = bad
        assert not torch.isfinite(global_norm(gradients, squares=kernels["squares"]))


def test_graphs_describe_the_kernels(kernels: dict[str, Counted]) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 2 * update.PIECE

    def numbers() -> Tensor:
        return torch.randn(count, generator=generator)

    rests = torch.randint(-(2**15), 2**15, (count,), generator=generator).to(torch.int16)
    settings = torch.tensor([0.999, 1e-2, 0.1, 0.99, 0.01, 1.5, 1e-8, 0.5])
    state = [numbers().bfloat16(), rests, numbers(), numbers().abs(), numbers().bfloat16()]
    for name, given in (
        ("adamw", [*state, settings]),
        ("squares", [state[0].clone(), torch.empty(2, dtype=torch.float64)]),
    ):
        graph = read_graph(write_graph(trace_update(name).module))
        expected = graph(*(tensor.clone() for tensor in given))
        found = kernels[name](given)
        if name == "adamw":  # the two halves of masters may differ where the whole does not
            found, expected = (
                [(w.float().view(torch.int32) + r).view(torch.float32), *moments]
                for w, r, *moments in (found, expected)
            )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_tensors_of_different_lengths_are_refused(kernels: dict[str, Counted]) -> None:
    long, short = torch.zeros(8, dtype=torch.bfloat16), torch.zeros(7)
    rests = torch.zeros(8, dtype=torch.int16)
    with pytest.raises(ExecutableError, match="differ in length"):
        kernels["adamw"]([long, rests, short, torch.zeros(8), long, torch.zeros(8)])
    with pytest.raises(ExecutableError, match="differ in length"):
        kernels["squares"]([long, torch.zeros(2, dtype=torch.float64)])
