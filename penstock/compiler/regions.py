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

from penstock.compiler.backward_parts import Part, backward_part
from penstock.compiler.graphs import ForwardBackward, Graph, leave_rows, trace, trace_joint
from penstock.compiler.kernels import TABLE, RegionContract
from penstock.compiler.plan import Plan
from penstock.config.recompute import kept_values
from penstock.models.architecture import Architecture
from penstock.models.embedding import Embed
from penstock.models.head import WEIGHT_NAMES, Head, head_weights
from penstock.models.loss import HeadOptions, loss_and_gradients, token_losses
from penstock.models.projection import is_trained
from penstock.models.rotary import rotation
from penstock.models.transformer import Block

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of weights and activations by the plan's `compute`."""

BACKWARD_PARTS: dict[str, Part] = {"backward_input": "input", "backward_weights": "weights"}
"""What of the gradients kernels give by themselves, by the end of their names."""

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


def _turns(plan: Plan, rows: int, count: int) -> Tensor | None:
    """The rotation a block is given for `count` positions of so many rows, if there is any."""
    positions = torch.empty(rows, count, dtype=torch.int64, device=plan.device)
    return rotation(plan.architecture, positions)


def _after_keys(region: str, plan: Plan) -> list[Tensor | None]:
    """What a region's `forward` takes after the dropout keys: an embedding positions, a block
    turns and segments; None for what this plan's regions are not given.
    """
    segments = _tokens(plan) if plan.takes_segments else None
    if region == "embed":
        return [segments if plan.architecture.positions == "learned" else None]
    rows = 1 if segments is None else plan.micro
    return [_turns(plan, rows, plan.sequence_length), segments]


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
    """Trace the forward, backward or evaluate kernel of Embed or Block, or a part of a block's
    backward kernel.
    """
    kind, activations, sites, skipped = {
        "embed": (Embed, [_tokens(plan)], _EMBED_SITES, 1),
        "block": (Block, [_activations(plan)], plan.architecture.dropout_sites, 0),
    }[region]
    call, parameters = _function(kind, "forward", plan)
    names = tuple(parameters)
    in_training = part != "evaluate" and plan.architecture.has_dropout
    keys = torch.empty(plan.micro, sites, dtype=torch.int64, device=plan.device)
    optional = [keys if in_training else None, *_after_keys(region, plan)]
    inputs = [*parameters.values(), *activations, *(t for t in optional if t is not None)]
    before = len(names) + len(activations)

    def function(*tensors: Tensor) -> tuple[Tensor]:
        given = iter(tensors[before:])
        rest = (None if absent is None else next(given) for absent in optional)
        return (call(*tensors[:before], *rest),)

    trained = [i for i, name in enumerate(names) if is_trained(plan.architecture, name)]
    differentiable = (*trained, *range(len(names), before - skipped))
    if part == "evaluate" or not differentiable:
        return TracedKernel(trace(function, inputs), RegionContract(names, 1))
    pair = trace_joint(function, inputs, differentiable, 1, kept_values(plan.recompute))
    contract = RegionContract(names, pair.output_count, pair.kept_inputs, pair.differentiable)
    if part == "forward":
        return TracedKernel(pair.forward, contract)
    if part in BACKWARD_PARTS:
        return trace_backward_part(pair, names, BACKWARD_PARTS[part])
    backward = pair.backward
    if region == "embed" and names.index(TABLE) in pair.differentiable:
        backward = leave_rows(backward, pair.differentiable.index(names.index(TABLE)))
    return TracedKernel(backward, contract)


def trace_backward_part(pair: ForwardBackward, names: tuple[str, ...], part: Part) -> TracedKernel:
    """The kernel of the gradient of x, the one input behind the parameters `names` that has one, or
    of the parameters' gradients.
    """
    found = backward_part(pair, part, len(names))
    contract = RegionContract(names, 1, (), found.differentiable, found.taken)
    return TracedKernel(found.graph, contract)


def _trace_head(part: str, plan: Plan) -> TracedKernel:
    """The head's forward and backward in one kernel (see `models/loss.py`), or, to evaluate,
    losses of each token without gradients; of one of `plan.loss_chunks` pieces of the tokens.

    In one kernel for all pieces, Inductor puts off the projection's gradients to the end and keeps
    every piece's logits until then.
    """
    with torch.device("meta"):
        parameters = _parameters(Head(plan.architecture), plan)
    names = tuple(parameters)
    rows = -(-plan.micro * plan.sequence_length // plan.loss_chunks)
    piece = dataclasses.replace(plan, micro=1, sequence_length=rows)
    inputs = [*parameters.values(), _activations(piece), _tokens(piece)]
    if part == "train":
        inputs.append(torch.empty(_shape(piece)[:2], dtype=torch.float32, device=plan.device))
        inputs.append(torch.empty((), dtype=torch.float32, device=plan.device))
    a = plan.architecture
    options = HeadOptions(a.norm_epsilon, a.activation, a.vocab_size, 1)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        weights = head_weights(dict(zip(names, tensors, strict=False)))
        x, targets, *rest = tensors[len(names) :]
        if part == "evaluate":
            return (token_losses(weights, x, targets, options),)
        loss_weights, z_loss = rest
        result = loss_and_gradients(weights, x, targets, loss_weights, z_loss, options)
        gradients = result.weights._asdict()
        by_name = {WEIGHT_NAMES[field]: gradient for field, gradient in gradients.items()}
        trained = [name for name in names if is_trained(a, name)]
        return (result.loss, result.cross_entropy, result.x, *(by_name[name] for name in trained))

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
    turns = _turns(plan, rows, count)
    inputs = [*parameters.values(), x, *cached, mask, *(() if turns is None else (turns,))]
    graph = trace(call, inputs, thin=True)
    return TracedKernel(graph, RegionContract(tuple(parameters), 3))


_TRACERS: dict[str, Callable[[Plan], TracedKernel]] = {
    **{
        f"{region}_{part}": functools.partial(_trace_region, part, region)
        for region in ("embed", "block")
        for part in ("forward", "backward", "evaluate")
    },
    **{f"block_{part}": functools.partial(_trace_region, part, "block") for part in BACKWARD_PARTS},
    "head_train": functools.partial(_trace_head, "train"),
    "head_evaluate": functools.partial(_trace_head, "evaluate"),
}
