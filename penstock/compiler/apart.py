"""A region whose gradients are computed apart: of its input first, of its weights in another pass.

`runtime.py` calls it where the kernels are there and a pipeline may ask for that (zero-bubble: Qi
et al., arXiv 2401.10241, §2). It must never know about schedules.

A call is two nodes of autograd's graph. Parameters reach the region through a node of their own,
so that whether their gradients are wanted can be asked of the engine; it gives an empty tensor:

    parameters → _Weights ─┐
                      x → _Apart → output

Torch's pipelines run `_Apart` to x alone, and again to `_Weights` alone; or once, to both.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from penstock.compiler.kernels import CompiledKernel
from penstock.compiler.region_inputs import Held


@dataclasses.dataclass(frozen=True)
class ApartKernels:
    """A region's kernels, and whether it keeps only its inputs and runs forward again."""

    forward: CompiledKernel
    backward: CompiledKernel
    for_input: CompiledKernel
    for_weights: CompiledKernel
    recompute: bool

    @staticmethod
    def find(
        kernels: Mapping[str, CompiledKernel], name: str, *, recompute: bool
    ) -> "ApartKernels | None":
        """Those of the region of this name, where they were compiled."""
        if f"{name}_backward_weights" not in kernels:
            return None
        parts = ("forward", "backward", "backward_input", "backward_weights")
        return ApartKernels(*(kernels[f"{name}_{part}"] for part in parts), recompute=recompute)

    def __call__(self, held: Held, inputs: Sequence[Tensor]) -> Tensor:
        """The region's output, of parameters, x and what comes after."""
        count = len(self.backward.contract.parameters)
        between = _Between(held)
        gate = _Weights.apply(self, between, *inputs[:count])
        detached = (parameter.detach() for parameter in inputs[:count])
        return _Apart.apply(self, between, gate, *detached, *inputs[count:])


class _Between:
    """What one call of a region has from its forward pass to its last backward pass."""

    def __init__(self, held: Held) -> None:
        self.held = held
        self.results: list[Tensor] = []
        """What the forward kernel has saved."""
        self.handed: dict[int, Tensor] | None = None
        """What the weights' kernel takes but the region's inputs, by place, once x's gradient is
        computed."""
        self.gradients: list[Tensor] = []
        """Of the parameters, on their way to `_Weights`."""


class _Weights(torch.autograd.Function):
    """Where the parameters' gradients come out."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context type is not public
        kernels: ApartKernels,
        between: _Between,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.places = kernels.for_weights.contract.differentiable
        ctx.between = between
        ctx.count = len(parameters)
        return torch.empty(0, device=parameters[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides its signature
        by_place = dict(zip(ctx.places, ctx.between.gradients, strict=True))
        ctx.between.gradients = []
        return (None, None, *(by_place.get(place) for place in range(ctx.count)))


class _Apart(torch.autograd.Function):
    """One call of a region, with the gradient of x, and of the gate of its parameters."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context type is not public
        kernels: ApartKernels,
        between: _Between,
        gate: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        contract = kernels.backward.contract
        results = kernels.forward.run(between.held.unpacked(inputs, range(len(inputs))))
        ctx.kernels, ctx.between, ctx.input_count = kernels, between, len(inputs)
        if kernels.recompute:
            ctx.save_for_backward(*inputs)
        else:
            # Not what the kernel has saved: autograd would keep it all until the last pass.
            ctx.save_for_backward(*(inputs[i] for i in contract.kept_inputs))
            between.results = results[contract.output_count :]
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides its signature
        between: _Between = ctx.between
        for_x = None
        if between.handed is not None:
            _give_weights(ctx)
        elif ctx.next_functions[0][0] is None:
            for_x = _give_input(ctx, grad_outputs)  # No parameter is trained.
            between.handed = None
        elif torch._C._will_engine_execute_node(ctx.next_functions[0][0]):
            for_x = _give_both(ctx, grad_outputs)
        else:
            for_x = _give_input(ctx, grad_outputs)
        gate = grad_outputs[0].new_empty(0, dtype=torch.float32)
        others = [None] * ctx.input_count
        others[len(ctx.kernels.backward.contract.parameters)] = for_x
        return (None, None, gate, *others)


def _row(ctx: Any, grad_outputs: Sequence[Tensor]) -> list[Tensor]:  # noqa: ANN401 - as above
    """What the whole backward kernel takes; the forward pass's results are given up with it."""
    kernels: ApartKernels = ctx.kernels
    between: _Between = ctx.between
    contract = kernels.backward.contract
    if not kernels.recompute:
        results, between.results = between.results, []
        kept = between.held.unpacked(ctx.saved_tensors, contract.kept_inputs)
        return [*kept, *results, *grad_outputs]
    inputs = between.held.unpacked(ctx.saved_tensors, range(ctx.input_count))
    results = kernels.forward.run(inputs)[contract.output_count :]
    return [*(inputs[i] for i in contract.kept_inputs), *results, *grad_outputs]


def _give_both(ctx: Any, grad_outputs: Sequence[Tensor]) -> Tensor:  # noqa: ANN401 - as above
    """All gradients at once: x's, and those of parameters left for `_Weights`."""
    whole: CompiledKernel = ctx.kernels.backward
    gradients = whole.run(_row(ctx, grad_outputs))
    for_x = gradients.pop(whole.contract.differentiable.index(len(whole.contract.parameters)))
    ctx.between.gradients = gradients
    return for_x


def _give_input(ctx: Any, grad_outputs: Sequence[Tensor]) -> Tensor:  # noqa: ANN401 - as above
    """The gradient of x alone; what the parameters' need is held."""
    kernels: ApartKernels = ctx.kernels
    row = _row(ctx, grad_outputs)
    taken = kernels.for_input.contract.taken
    for_x, *handed = kernels.for_input.run([row[i] for i in taken])
    row += handed
    # The region's inputs are kept anyway, those held in few bits as they are.
    first = len(kernels.backward.contract.kept_inputs)
    wanted = (i for i in kernels.for_weights.contract.taken if i >= first)
    ctx.between.handed = {i: row[i] for i in wanted}
    return for_x


def _give_weights(ctx: Any) -> None:  # noqa: ANN401 - as above
    """The parameters' gradients, left for `_Weights`; what was held is given up."""
    kernels: ApartKernels = ctx.kernels
    between: _Between = ctx.between
    places = kernels.backward.contract.kept_inputs
    taken = kernels.for_weights.contract.taken
    handed, between.handed = between.handed or {}, None
    wanted = [i for i in taken if i < len(places)]
    saved = [ctx.saved_tensors[places[i] if kernels.recompute else i] for i in wanted]
    kept = between.held.unpacked(saved, [places[i] for i in wanted])
    row = {**dict(zip(wanted, kept, strict=True)), **handed}
    between.gradients = kernels.for_weights.run([row[i] for i in taken])
