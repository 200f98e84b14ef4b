"""The optimizer against torch's AdamW, a float64 closed form, and its own promises."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from penstock.config.schema import OptimizerSection
from penstock.errors import CheckpointError
from penstock.training.gradient_norm import global_norm
from penstock.training.optimizer import AdamW, parameter_groups
from penstock.training.optimizers import make_optimizer

SHAPES = {
    "embed.tokens.weight": (97, 24),
    "blocks.0.attention_norm.weight": (24,),
    "blocks.0.mlp.up.weight": (96, 24),
    "blocks.0.mlp.up.bias": (96,),
    "head.projection.weight": (97, 24),
}
DECAYED = {"blocks.0.mlp.up.weight", "head.projection.weight"}


def make_parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def set_gradients(parameters: dict[str, Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (noise * (1 + step)).to(parameter.dtype)


def closed_form(
    start: dict[str, Tensor], gradients: list[dict[str, Tensor]], section: OptimizerSection
) -> dict[str, Tensor]:
    """AdamW written out in float64 after arXiv 1711.05101, algorithm 2, with clipping."""
    beta1, beta2 = section.betas
    weights = {name: value.double() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    for count, step in enumerate(gradients, start=1):
        norm = sum(float((g.double() ** 2).sum()) for g in step.values()) ** 0.5
        factor = min(1.0, section.clip / norm) if section.clip else 1.0
        for name, gradient in step.items():
            g = gradient.double() * factor
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g * g
            decay = section.weight_decay if name in DECAYED else 0.0
            update = (first[name] / (1 - beta1**count)) / (
                (second[name] / (1 - beta2**count)).sqrt() + section.eps
            )
            weights[name] = weights[name] * (1 - section.lr * decay) - section.lr * update
    return weights


@pytest.mark.parametrize("group_bytes", [None, 4 * 100])
def test_twenty_fp32_steps_equal_torch_adamw(group_bytes: int | None) -> None:
    section = OptimizerSection(lr=3e-3, weight_decay=0.1, clip=None)
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer = AdamW(ours.items(), section, group_bytes=group_bytes)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[n] for n in SHAPES if n in DECAYED], "weight_decay": 0.1},
            {"params": [theirs[n] for n in SHAPES if n not in DECAYED], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=section.betas,
        eps=section.eps,
    )
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(section.lr)
        reference.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    assert optimizer.steps == 20


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("group_bytes", [None, 4 * 1000])
def test_bf16_parameters_with_fp32_masters_follow_the_float64_closed_form(
    clip: float | None, group_bytes: int | None
) -> None:
    section = OptimizerSection(lr=2e-3, clip=clip)
    parameters = make_parameters(torch.bfloat16)
    start = {name: value.detach().float() for name, value in parameters.items()}
    optimizer = AdamW(parameters.items(), section, group_bytes=group_bytes)
    history = []
    for step in range(20):
        set_gradients(parameters, step)
        history.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
        optimizer.step(section.lr, grad_norm=global_norm(optimizer.gradients()))
    expected = closed_form(start, history, section)
    state = optimizer.state_tensors()
    for name, parameter in parameters.items():
        master = state[f"master.{name}"]
        torch.testing.assert_close(master.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(parameter.detach(), master.bfloat16())


def test_updates_too_small_for_bf16_are_not_lost() -> None:
    parameters = {"mlp.weight": Parameter(torch.ones(8, 8, dtype=torch.bfloat16))}
    section = OptimizerSection(lr=1e-4, weight_decay=0.0)
    optimizer = AdamW(parameters.items(), section)
    for _ in range(100):
        parameters["mlp.weight"].grad = torch.ones(8, 8, dtype=torch.bfloat16)
        optimizer.step(1e-4)
    expected = torch.full((8, 8), 1 - 100 * 1e-4)
    torch.testing.assert_close(optimizer.state_tensors()["master.mlp.weight"], expected)
    assert torch.equal(parameters["mlp.weight"].detach(), expected.bfloat16())


def test_gradients_kept_in_fp32_give_the_same_step_as_their_bf16_equals() -> None:
    section = OptimizerSection()
    first, second = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16)
    one, two = AdamW(first.items(), section), AdamW(second.items(), section)
    set_gradients(first, 0)
    set_gradients(second, 0)
    norm = global_norm(one.gradients())
    one.step(1e-3, grad_norm=norm)
    two.step(1e-3, grad_norm=norm, gradients=[g.float() for g in two.gradients()])
    for (name, ours), theirs in zip(
        one.state_tensors().items(), two.state_tensors().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_gradient_below_the_clip_is_left_alone_and_one_above_is_scaled_to_it() -> None:
    for factor, expected in ((0.01, 0.01), (100.0, 1.0)):
        parameter = Parameter(torch.zeros(4, 4))
        optimizer = AdamW([("mlp.weight", parameter)], OptimizerSection(clip=1.0, betas=(0, 0.9)))
        parameter.grad = torch.full((4, 4), factor / 4)
        optimizer.step(0.0, grad_norm=global_norm(optimizer.gradients()))
        moment = optimizer.state_tensors()["exp_avg.mlp.weight"]
        torch.testing.assert_close(moment.norm(), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_nothing_at_all(dtype: torch.dtype) -> None:
    parameters = make_parameters(dtype)
    optimizer = AdamW(parameters.items(), OptimizerSection())
    set_gradients(parameters, 0)
    optimizer.step(1e-3)
    before = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    weights = {name: value.detach().clone() for name, value in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    norm = global_norm(optimizer.gradients())
    optimizer.step(1e-3, grad_norm=norm, skip=~torch.isfinite(norm))
    assert optimizer.steps == 1
    for name, value in optimizer.state_tensors().items():
        assert torch.equal(value, before[name]), name
    for name, value in parameters.items():
        assert torch.equal(value.detach(), weights[name]), name


def test_only_matrices_that_are_not_embeddings_decay() -> None:
    decayed, others = parameter_groups(make_parameters(torch.float32).items(), decay_all=False)
    assert {name for name, _ in decayed} == DECAYED
    assert {name for name, _ in others} == SHAPES.keys() - DECAYED


def test_decay_all_decays_everything_and_frozen_parameters_are_left_out() -> None:
    parameters = make_parameters(torch.float32)
    parameters["embed.tokens.weight"].requires_grad_(False)
    decayed, others = parameter_groups(parameters.items(), decay_all=True)
    assert [name for name, _ in decayed] == list(SHAPES)[1:]
    assert others == []


def test_a_head_tied_to_the_embedding_does_not_decay() -> None:
    model = torch.nn.Module()
    model.embed = torch.nn.Module()
    model.embed.tokens = torch.nn.Embedding(7, 3)
    model.head = torch.nn.Linear(3, 7, bias=False)
    model.head.weight = model.embed.tokens.weight
    decayed, others = parameter_groups(model.named_parameters(), decay_all=False)
    assert decayed == []
    assert [name for name, _ in others] == ["embed.tokens.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_saved_state_is_bit_identical(dtype: torch.dtype) -> None:
    section = OptimizerSection()
    first = make_parameters(dtype)
    undisturbed = AdamW(first.items(), section)
    saved: dict[str, Tensor] = {}
    for step in range(6):
        if step == 3:
            saved = {name: value.clone() for name, value in undisturbed.state_tensors().items()}
        set_gradients(first, step)
        undisturbed.step(1e-3, grad_norm=global_norm(undisturbed.gradients()))
    second = make_parameters(dtype, seed=9)
    resumed = AdamW(second.items(), section)
    resumed.load_state_tensors(saved)
    resumed.steps = 3
    for step in range(3, 6):
        set_gradients(second, step)
        resumed.step(1e-3, grad_norm=global_norm(resumed.gradients()))
    for name, value in undisturbed.state_tensors().items():
        assert torch.equal(value, resumed.state_tensors()[name]), name
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_state_of_another_architecture_is_refused_and_nothing_changes() -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = AdamW(parameters.items(), OptimizerSection())
    good = {name: value + 1 for name, value in optimizer.state_tensors().items()}
    before = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    missing = dict(itertools.islice(good.items(), len(good) - 1))
    reshaped = good | {"master.blocks.0.mlp.up.bias": torch.zeros(95)}
    narrow = good | {"master.blocks.0.mlp.up.bias": torch.zeros(96, dtype=torch.bfloat16)}
    for wrong in (missing, reshaped, narrow):
        with pytest.raises(CheckpointError, match=r"does not fit the model: (exp|master)"):
            optimizer.load_state_tensors(wrong)
        for name, value in optimizer.state_tensors().items():
            assert torch.equal(value, before[name])


def test_masters_more_exact_than_the_parameters_are_taken() -> None:
    parameters = make_parameters(torch.bfloat16)
    exact = {name: torch.full(shape, 1 / 3) for name, shape in SHAPES.items()}
    given = dict(exact)
    optimizer = AdamW(parameters.items(), OptimizerSection(), masters=given)
    assert not given  # their memory is the moments' now
    for name, value in exact.items():
        assert torch.equal(optimizer.state_tensors()[f"master.{name}"], value)
        assert torch.equal(parameters[name].detach(), value.bfloat16())


def test_a_parameter_without_gradient_is_named() -> None:
    parameters = make_parameters(torch.float32)
    optimizer = AdamW(parameters.items(), OptimizerSection())
    set_gradients(parameters, 0)
    parameters["blocks.0.mlp.up.bias"].grad = None
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp\.up\.bias"):
        optimizer.step(1e-3)
    set_gradients(parameters, 0)
    optimizer.zero_gradients()
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_millions_of_bf16_gradients_is_summed_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (5_000_003, 1024, 7, 1_048_576)
    gradients = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    exact = sum(float((g.double() ** 2).sum()) for g in gradients) ** 0.5
    norm = global_norm(gradients)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert float(norm) == pytest.approx(exact, rel=1e-6)


def test_the_norm_shows_every_nan_and_infinity() -> None:
    for bad in (float("nan"), float("inf")):
        gradients = [torch.ones(3000), torch.ones(5)]
        gradients[0][2999] = bad
        assert not torch.isfinite(global_norm(gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_of_the_rate_and_the_pieces_change_last_digits_at_most(dtype: torch.dtype) -> None:
    states = []
    for lr, group_bytes in ((3e-3, None), (torch.tensor(3e-3), None), (3e-3, 4 * 97)):
        parameters = make_parameters(dtype)
        optimizer = AdamW(parameters.items(), OptimizerSection(), group_bytes=group_bytes)
        for step in range(5):
            set_gradients(parameters, step)
            optimizer.step(lr, grad_norm=global_norm(optimizer.gradients()))
        states.append(optimizer.state_tensors())
    # A tensor holds the rate in fp32, a number in fp64; ends of pieces are not vectorized.
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-7)


def test_parameters_of_two_formats_are_trained_side_by_side() -> None:
    mixed = make_parameters(torch.bfloat16)
    norm = "blocks.0.attention_norm.weight"
    mixed[norm] = Parameter(mixed[norm].detach().float())
    alike = make_parameters(torch.bfloat16)
    section = OptimizerSection(clip=None)
    one, two = AdamW(mixed.items(), section), AdamW(alike.items(), section)
    for step in range(3):
        set_gradients(alike, step)
        for name, parameter in alike.items():
            mixed[name].grad = parameter.grad.to(mixed[name].dtype)
        one.step(1e-2)
        two.step(1e-2)
    for name, value in two.state_tensors().items():
        assert torch.equal(value, one.state_tensors()[name]), name
    assert torch.equal(mixed[norm].detach(), two.state_tensors()[f"master.{norm}"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_steps_as_the_cpu_does_without_being_waited_for(dtype: torch.dtype) -> None:
    section = OptimizerSection(clip=0.5)
    here = make_parameters(dtype)
    there = {name: Parameter(value.detach().cuda()) for name, value in here.items()}
    one, two = AdamW(here.items(), section), AdamW(there.items(), section)
    for step in range(5):
        set_gradients(here, step)
        for name, parameter in here.items():
            there[name].grad = parameter.grad.cuda()
        one.step(1e-3, grad_norm=global_norm(one.gradients()))
        torch.cuda.set_sync_debug_mode("error")
        norm = global_norm(two.gradients())
        two.step(1e-3, grad_norm=norm, skip=~torch.isfinite(norm))
        torch.cuda.set_sync_debug_mode("default")
    for name, value in one.state_tensors().items():
        torch.testing.assert_close(two.state_tensors()[name].cpu(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_state_is_not_touched_before_who_reads_it_is_done(name: str) -> None:
    parameters = make_parameters(torch.float32)
    optimizer = make_optimizer(parameters.items(), OptimizerSection(name=name))
    before = {n: tensor.clone() for n, tensor in optimizer.state_tensors().items()}
    seen: list[bool] = []

    def reader() -> None:
        found = optimizer.state_tensors()
        seen.append(all(torch.equal(found[n], tensor) for n, tensor in before.items()))

    optimizer.before_step = reader
    set_gradients(parameters, 0)
    optimizer.step(1e-2)
    assert seen == [True]
    found = optimizer.state_tensors()
    assert not all(torch.equal(found[n], tensor) for n, tensor in before.items())
