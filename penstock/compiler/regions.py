"""What the three regions of a transformer compute, as kernels: names, tensors, traced graphs.

`compiler/build.py` has lowered what `trace_kernel` returns; `compiler/runtime.py` calls the result
by the `RegionContract` it carries. It must never know about machine code, files or training.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.compiler.graphs import Graph, trace, trace_joint
from penstock.compiler.kernels import RegionContract
from penstock.compiler.plan import Plan
from penstock.models.architecture import Architecture
from penstock.models.loss import loss_and_gradients, token_losses
from penstock.models.projection import is_trained
from penstock.models.rotary import rotation
from penstock.models.transformer import Block, Embed, Head

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of weights and activations by the plan's `compute`."""

_EMBED_SITES = 1


@dataclasses.dataclass(frozen=True)
class TracedKernel:
    """One kernel before it is lowered."""

    graph: Graph
    contract: RegionContract


def trace_kernel(plan: Plan, name: str) -> TracedKernel:
    """Trace one of `build.kernel_names(plan)`; no weights are allocated."""
    with FakeTensorMode():
        if name in _TRACERS:
            return _TRACERS[name](plan)
        return _trace_decoding(plan, *plan.generation_shapes().kernels()[name])


def _shape(plan: Plan) -> tuple[int, int, int]:
    """(B, T, D) of the residual stream."""
    return plan.micro, plan.sequence_length, plan.architecture.hidden_size


def _activations(plan: Plan) -> Tensor:
    return torch.empty(_shape(plan), dtype=COMPUTE_DTYPES[plan.compute], device=plan.device)


def _tokens(plan: Plan) -> Tensor:
    return torch.empty(_shape(plan)[:2], dtype=torch.int64, device=plan.device)


def _parameters(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Stand-ins for a meta module's parameters, in the compute dtype."""
    dtype = COMPUTE_DTYPES[plan.compute]
    return {
        name: torch.empty(parameter.shape, dtype=dtype, device=plan.device)
        for name, parameter in module.named_parameters()
    }


def _turns(plan: Plan, rows: int, count: int) -> list[Tensor]:
    """The rotation a block is given for `count` positions of so many rows, if there is any."""
    positions = torch.empty(rows, count, dtype=torch.int64, device=plan.device)
    turns = rotation(plan.architecture, positions)
    return [] if turns is None else [turns]


class _Method(nn.Module):
    """A module's method as a module of its own, so that it can be called with other weights."""

    def __init__(self, inner: nn.Module, method: str) -> None:
        super().__init__()
        self.inner = inner
        self.method = method

    def forward(self, *inputs: Any) -> Any:  # noqa: ANN401 - whatever the method takes and gives
        return getattr(self.inner, self.method)(*inputs)


def _function(
    kind: Callable[[Architecture], nn.Module], method: str, plan: Plan
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """A region's method as a function of (parameters…, inputs…), and its parameters by name."""
    with torch.device("meta"):
        module = kind(plan.architecture)
    parameters = _parameters(module, plan)
    called = _Method(module, method)

    def function(*tensors: Tensor | None) -> Any:  # noqa: ANN401 - whatever the method gives
        named = zip(parameters, tensors, strict=False)
        weights = {f"inner.{name}": tensor for name, tensor in named if tensor is not None}
        return torch.func.functional_call(called, weights, tensors[len(parameters) :])

    return function, parameters


def _trace_region(part: str, region: str, plan: Plan) -> TracedKernel:
    """Trace the forward, backward or evaluate kernel of Embed or Block."""
    kind, activations, sites, skipped = {
        "embed": (Embed, [_tokens(plan)], _EMBED_SITES, 1),
        "block": (Block, [_activations(plan)], plan.architecture.dropout_sites, 0),
    }[region]
    call, parameters = _function(kind, "forward", plan)
    names = tuple(parameters)
    inputs = [*parameters.values(), *activations]
    in_training = part != "evaluate" and plan.architecture.has_dropout
    if in_training:
        inputs.append(torch.empty(plan.micro, sites, dtype=torch.int64, device=plan.device))
    turns = _turns(plan, 1, plan.sequence_length) if region == "block" else []
    inputs += turns
    before = len(names) + len(activations)

    def function(*tensors: Tensor) -> tuple[Tensor]:
        keys = () if in_training else (None,)
        return (call(*tensors[:before], *keys, *tensors[before:]),)

    trained = [i for i, name in enumerate(names) if is_trained(plan.architecture, name)]
    differentiable = (*trained, *range(len(names), before - skipped))
    if part == "evaluate" or not differentiable:
        return TracedKernel(trace(function, inputs), RegionContract(names, 1))
    pair = trace_joint(function, inputs, differentiable, 1)
    contract = RegionContract(names, pair.output_count, pair.kept_inputs, pair.differentiable)
    return TracedKernel(pair.forward if part == "forward" else pair.backward, contract)


def _trace_head(part: str, plan: Plan) -> TracedKernel:
    """The head's forward and backward in one kernel (see `models/loss.py`), or, to evaluate,
    losses of each token without gradients.
    """
    with torch.device("meta"):
        parameters = _parameters(Head(plan.architecture), plan)
    names = tuple(parameters)
    inputs = [*parameters.values(), _activations(plan), _tokens(plan)]
    if part == "train":
        inputs.append(torch.empty(_shape(plan)[:2], dtype=torch.float32, device=plan.device))
        inputs.append(torch.empty((), dtype=torch.float32, device=plan.device))
    options: dict[str, Any] = {
        "epsilon": plan.architecture.norm_epsilon,
        "vocab_size": plan.architecture.vocab_size,
        "chunks": plan.loss_chunks,
    }

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, tensors, strict=False))
        first = (named["norm.weight"], named.get("norm.bias"), named["projection.weight"])
        rest, bias = tensors[len(names) :], named.get("projection.bias")
        if part == "evaluate":
            return (token_losses(*first, *rest, bias=bias, **options),)
        results = loss_and_gradients(*first, *rest, bias=bias, **options)
        # Loss, cross entropy, the gradient of x; the others where they are trained.
        wanted = results if is_trained(plan.architecture, "projection.weight") else results[:3]
        return tuple(result for result in wanted if result is not None)

    graph = trace(function, inputs)
    return TracedKernel(graph, RegionContract(names, len(graph.outputs)))


def _trace_decoding(plan: Plan, rows: int, count: int, length: int) -> TracedKernel:
    """A block over `count` new positions of `rows` texts after `length` cached ones, or, without
    any cached, the head over one position of each.
    """
    a, dtype, device = plan.architecture, COMPUTE_DTYPES[plan.compute], plan.device
    if length == 0:
        x = torch.empty(rows, a.hidden_size, dtype=dtype, device=device)
        call, parameters = _function(Head, "logits", plan)
        graph = trace(lambda *t: (call(*t).float(),), [*parameters.values(), x], thin=True)
        return TracedKernel(graph, RegionContract(tuple(parameters), 1))
    x = torch.empty(rows, count, a.hidden_size, dtype=dtype, device=device)
    shape = (rows, a.heads // a.group_size, plan.sequence_length, a.head_size)
    cached = [torch.empty(shape, dtype=dtype, device=device)[:, :, :length] for _ in range(2)]
    mask = torch.empty(rows, 1, count, length + count, dtype=torch.bool, device=device)
    call, parameters = _function(Block, "decode", plan)
    inputs = [*parameters.values(), x, *cached, mask, *_turns(plan, rows, count)]
    graph = trace(call, inputs, thin=True)
    return TracedKernel(graph, RegionContract(tuple(parameters), 3))


_TRACERS: dict[str, Callable[[Plan], TracedKernel]] = {
    **{
        f"{region}_{part}": functools.partial(_trace_region, part, region)
        for region in ("embed", "block")
        for part in ("forward", "backward", "evaluate")
    },
    "head_train": functools.partial(_trace_head, "train"),
    "head_evaluate": functools.partial(_trace_head, "evaluate"),
}
