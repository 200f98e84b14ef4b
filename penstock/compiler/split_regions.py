"""Kernels of a part of a divided block: what it computes between the sums over all parts.

`compiler/build.py` has lowered what `trace_part` returns, `compiler/runtime.py` calls the result in
place of the methods of a `SplitBlock`. It must never know about processes.
"""

import dataclasses

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.compiler.graphs import trace, trace_joint
from penstock.compiler.kernels import RegionContract
from penstock.compiler.plan import Plan
from penstock.compiler.regions import (
    BACKWARD_PARTS,
    COMPUTE_DTYPES,
    TracedKernel,
    trace_backward_part,
)
from penstock.config.recompute import kept_values
from penstock.models.projection import is_trained
from penstock.models.rotary import rotation
from penstock.models.split_block import SplitBlock

_PARAMETERS = {
    "attend": (
        *("attention_norm.", "attention.query_key_value."),
        *("attention.output.weight", "attention.output.adapters."),
    ),
    "feed": (
        *("attention_norm.", "mlp_norm.", "mlp.up.", "mlp.gate."),
        *("mlp.down.weight", "mlp.down.adapters."),
    ),
    "attended": ("attention.output.bias",),
    "fed": ("mlp.down.bias",),
}
"""Method of `SplitBlock` → what the names of the parameters it may use begin with."""


@dataclasses.dataclass(frozen=True)
class _Called:
    """A method as a function of parameters, the residual stream and what comes after it."""

    block: SplitBlock
    method: str
    names: tuple[str, ...]
    present: tuple[bool, ...]
    """Of dropout keys, rotation and segments, which are given."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor]:
        weights = {f"inner.{name}": t for name, t in zip(self.names, tensors, strict=False)}
        x, *more = tensors[len(self.names) :]
        given = iter(more)
        rest = [next(given) if is_given else None for is_given in self.present]
        while rest and rest[-1] is None:
            rest.pop()
        called = _Method(self.block, self.method)
        return (torch.func.functional_call(called, weights, (x, *rest)),)


class _Method(torch.nn.Module):
    """A method as a module, so that it can be called with other weights."""

    def __init__(self, inner: SplitBlock, method: str) -> None:
        super().__init__()
        self.inner, self.method = inner, method

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return getattr(self.inner, self.method)(*inputs)


def trace_part(plan: Plan, kernel: str) -> TracedKernel:
    """Trace METHOD_forward, METHOD_backward, a part of the latter, or METHOD_evaluate; no weights
    are allocated.
    """
    method, _, part = kernel.partition("_")
    a, dtype = plan.architecture, COMPUTE_DTYPES[plan.compute]
    with FakeTensorMode():
        block = SplitBlock(a, 0, plan.tensor)
        used = _used(block, method)
        parameters = {
            name: torch.empty(parameter.shape, dtype=dtype, device=plan.device)
            for name, parameter in block.named_parameters()
            if name in used
        }
        shape = (plan.micro, plan.sequence_length)
        x = torch.empty(*shape, a.hidden_size, dtype=dtype, device=plan.device)
        after = _after(plan, method, in_training=part != "evaluate")
        inputs = [*parameters.values(), x, *(t for t in after if t is not None)]
        present = tuple(tensor is not None for tensor in after)
        function = _Called(block, method, tuple(parameters), present)
        names = tuple(parameters)
        if part == "evaluate":
            return TracedKernel(trace(function, inputs), RegionContract(names, 1))
        trained = [i for i, name in enumerate(names) if is_trained(a, name)]
        differentiable = (*trained, len(names))
        pair = trace_joint(function, inputs, differentiable, 1, kept_values(plan.recompute))
    if part in BACKWARD_PARTS:
        return trace_backward_part(pair, names, BACKWARD_PARTS[part])
    contract = RegionContract(names, pair.output_count, pair.kept_inputs, pair.differentiable)
    return TracedKernel(pair.forward if part == "forward" else pair.backward, contract)


def _used(block: SplitBlock, method: str) -> set[str]:
    """Names of the parameters a method uses."""
    prefixes = _PARAMETERS[method]
    if block.normalizes_sums:
        prefixes = tuple(prefix for prefix in prefixes if "norm" not in prefix)
    elif method == "feed" and block.mlp_norm is not None:
        prefixes = tuple(prefix for prefix in prefixes if prefix != "attention_norm.")
    return {name for name, _ in block.named_parameters() if name.startswith(prefixes)}


def _after(plan: Plan, method: str, *, in_training: bool) -> tuple[Tensor | None, ...]:
    """Keys, rotation and segments, where the method takes them and this plan's blocks have them."""
    a, shape = plan.architecture, (plan.micro, plan.sequence_length)
    keys = None
    if in_training and (a.has_dropout if method != "feed" else a.adapter_rate > 0):
        keys = torch.empty(plan.micro, a.dropout_sites, dtype=torch.int64, device=plan.device)
    if method != "attend":
        return (keys,)
    segments = torch.empty(shape, dtype=torch.int64) if plan.takes_segments else None
    places = torch.empty(1 if segments is None else plan.micro, shape[1], dtype=torch.int64)
    return (keys, rotation(a, places), segments)
