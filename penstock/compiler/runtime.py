"""Run a transformer's regions through compiled kernels, as ordinary autograd functions.

`attach` replaces the `forward` of the model's Embed, Blocks and Head; the modules and parameters
stay ordinary, so everything of PyTorch composes. It must never import a tracer or a compiler.
"""

import contextlib
import functools
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from penstock.compiler.apart import ApartKernels
from penstock.compiler.kernels import TABLE, CompiledKernel
from penstock.compiler.region_inputs import Held, parameters_of, region_inputs
from penstock.config.recompute import is_recomputed
from penstock.errors import ExecutableError
from penstock.models.split_block import SplitBlock
from penstock.models.transformer import Transformer

_Kernels = Mapping[str, CompiledKernel]
"""By name."""


def attach(
    model: Transformer, kernels: _Kernels, *, recompute: str = "selective", stages: int = 1
) -> None:
    """Make `model` compute through `kernels` from now on, whole or cut into so many `stages`.

    Blocks that `recompute` (`config/recompute.py`) names keep only their inputs and run forward
    again in the backward pass; the others keep what the kernels were cut at. Afterwards the model
    takes exactly the shapes the kernels were compiled for.
    """
    a = model.architecture
    embed = _Region(kernels, "embed", recompute=False)
    embed.table_shape = (a.padded_vocab_size, a.embedding_width)
    embed.is_tied = a.tie_embeddings and stages == 1
    model.embed.forward = functools.partial(embed, model.embed)  # pyright: ignore[reportAttributeAccessIssue] - the point of attaching
    if any(isinstance(block, SplitBlock) for block in model.blocks):
        _attach_parts(model, kernels, recompute, stages)
    else:
        blocks = [
            _Region(kernels, "block", recompute=again, stages=stages) for again in (False, True)
        ]
        for index, module in enumerate(model.blocks):
            module.forward = functools.partial(blocks[is_recomputed(recompute, index)], module)
    head = _Head(kernels)
    model.head.forward = functools.partial(head.loss, model.head)
    model.head.token_losses = functools.partial(head.token_losses, model.head)  # type: ignore[method-assign]


def _attach_parts(model: Transformer, kernels: _Kernels, recompute: str, stages: int) -> None:
    """Make divided blocks compute through kernels what lies between their meetings, from which
    recomputing one starts: no sum is taken twice.
    """
    halves = [
        {
            name: _Region(kernels, name, recompute=again, stages=stages)
            for name in ("attend", "feed")
        }
        for again in (False, True)
    ]
    names = [name for name in ("attended", "fed") if f"{name}_forward" in kernels]
    updates = {name: _Region(kernels, name, recompute=False) for name in names}
    for index, block in enumerate(dict.fromkeys(model.blocks)):  # shared layers are one block
        for name, region in halves[is_recomputed(recompute, index)].items():
            setattr(block, name, functools.partial(region, block))
        for name, region in updates.items():
            setattr(block, name, functools.partial(region, block))


class _Region:
    """Embed or Block: the kernels every layer of that kind shares."""

    def __init__(self, kernels: _Kernels, name: str, *, recompute: bool, stages: int = 1) -> None:
        self.evaluate = kernels.get(f"{name}_evaluate") or kernels[f"{name}_forward"]
        # An executable for evaluation has no other kernels.
        self.forward = kernels.get(f"{name}_forward", self.evaluate)
        self.backward = kernels.get(f"{name}_backward")
        self.recompute = recompute
        # Only a pipeline's schedule asks for gradients of inputs alone.
        self.apart = ApartKernels.find(kernels, name, recompute=recompute) if stages > 1 else None
        # What only training computes drops.
        self.has_dropout = self.forward is not self.evaluate or name in ("attended", "fed")
        # Equal positions add to one row of the embedding's gradient; torch's parallel sum of them
        # changes its order from call to call.
        self.needs_ordered_sums = name == "embed"
        self.table_shape: tuple[int, int] = (0, 0)
        self.is_tied = False

    def __call__(
        self,
        module: nn.Module,
        x: Tensor,
        keys: Tensor | None = None,
        *after: Tensor | None,
    ) -> Tensor:
        """What `module.forward(x, keys, *after)` computes: an embedding takes positions then, a
        block turns and segments.
        """
        if not self.has_dropout:
            keys = None
        others = [given for given in (keys, *after) if given is not None]
        inputs, held = region_inputs(module, self.forward.contract, x, others)
        if torch.is_grad_enabled() and any(given.requires_grad for given in inputs):
            if self.backward is None:
                raise ExecutableError("the executable is for evaluation: it has no gradients")
            if self.has_dropout and keys is None:
                raise ExecutableError(
                    "the executable trains with dropout, but no dropout keys were given",
                    do="give keys, or compile with model.dropout=0",
                )
            if self.apart is not None:
                return self.apart(held, inputs)
            return _RegionFunction.apply(self, self.backward, held, *inputs)
        kernel = self.forward if keys is not None else self.evaluate
        return kernel.run(held.unpacked(inputs, range(len(inputs))))[0]

    def table_gradient(self, tokens: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The table's gradient (V, E) from rows (B, T, E) float32, equal tokens added in order.

        Where the head's projection is the table too, it is sparse: autograd adds it to the head's
        as it is, and no tensor of zeros is made.
        """
        distinct, places = torch.unique(tokens, return_inverse=True)
        sums = rows.new_zeros(len(distinct), rows.shape[-1])
        sums = sums.index_add_(0, places.flatten(), rows.flatten(0, 1)).to(dtype)
        if self.is_tied:
            return torch.sparse_coo_tensor(
                distinct.unsqueeze(0), sums, self.table_shape,
                check_invariants=False, is_coalesced=True,
            )  # fmt: skip
        return sums.new_zeros(self.table_shape).index_copy_(0, distinct, sums)


@contextlib.contextmanager
def _ordered_sums(wanted: bool) -> Generator[None]:
    """Make torch add in a fixed order inside; through the C function, because the public one
    imports the compiler's configuration.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch._C._set_deterministic_algorithms(before or wanted)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before)


class _RegionFunction(torch.autograd.Function):
    """One call of a region, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context type is not public
        region: _Region,
        backward: CompiledKernel,
        held: Held,
        *inputs: Tensor,
    ) -> Tensor:
        contract = backward.contract
        results = region.forward.run(held.unpacked(inputs, range(len(inputs))))
        outputs = results[: contract.output_count]
        saved = results[contract.output_count :]
        ctx.region = region
        ctx.backward = backward
        ctx.held = held
        ctx.input_count = len(inputs)
        if region.recompute:
            ctx.save_for_backward(*inputs)
        else:
            ctx.save_for_backward(*(inputs[i] for i in contract.kept_inputs), *saved)
        return outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides its signature
        region: _Region = ctx.region
        backward: CompiledKernel = ctx.backward
        contract = backward.contract
        held: Held = ctx.held
        places = range(ctx.input_count) if region.recompute else contract.kept_inputs
        saved = held.unpacked(ctx.saved_tensors, places)
        if region.recompute:
            results = region.forward.run(saved)
            saved = [*(saved[i] for i in contract.kept_inputs), *results[contract.output_count :]]
            del results
        with _ordered_sums(region.needs_ordered_sums):
            results = backward.run([*saved, *grad_outputs])
        by_input: list[Tensor | None] = [None] * ctx.input_count
        for index, gradient in zip(contract.differentiable, results, strict=True):
            by_input[index] = gradient
            if contract.parameters[index : index + 1] == (TABLE,):
                tokens = saved[contract.kept_inputs.index(len(contract.parameters))]
                dtype = grad_outputs[0].dtype
                by_input[index] = region.table_gradient(tokens, gradient, dtype)
        return (None, None, None, *by_input)


class _Head:
    """The head: loss with gradients in one kernel, and losses per token; both piece by piece."""

    def __init__(self, kernels: _Kernels) -> None:
        self.train = kernels.get("head_train")
        self.evaluate = kernels["head_evaluate"]

    def loss(
        self,
        module: nn.Module,
        x: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        z_loss: Tensor | None = None,
    ) -> Tensor:
        """What `Head.forward` computes: () float32."""
        z_loss = x.new_zeros((), dtype=torch.float32) if z_loss is None else z_loss
        if torch.is_grad_enabled() and self.train is not None:
            parameters = parameters_of(module, self.train.contract)
            return _HeadFunction.apply(self.train, targets, loss_weights, z_loss, x, *parameters)
        losses = self.token_losses(module, x, targets)
        return (losses * loss_weights).sum()

    def token_losses(self, module: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """What `Head.token_losses` computes: (B, T) float32."""
        parameters = parameters_of(module, self.evaluate.contract)
        pieces = _pieces(self.evaluate, x, targets)
        losses = [self.evaluate.run([*parameters, *piece])[0] for piece in pieces]
        return torch.cat(losses, 1)[:, : targets.numel()].view(targets.shape)


def _pieces(kernel: CompiledKernel, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors (B, T, …) cut into pieces (1, n, …) of the size the kernel takes; what the last one
    lacks is zero, weights included.
    """
    size = kernel.run.spec.inputs[len(kernel.contract.parameters)].shape[1]
    cut: list[tuple[Tensor, ...]] = []
    for tensor in tensors:
        rows = tensor.flatten(0, 1)
        lacking = -len(rows) % size
        if lacking:
            rows = torch.cat([rows, rows.new_zeros(lacking, *rows.shape[1:])])
        cut.append(tuple(piece.unsqueeze(0) for piece in rows.split(size)))
    return list(zip(*cut, strict=True))


class _HeadFunction(torch.autograd.Function):
    """The loss, whose gradients the forward kernel has already computed."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context type is not public
        kernel: CompiledKernel,
        targets: Tensor,
        loss_weights: Tensor,
        z_loss: Tensor,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        pieces = _pieces(kernel, x, targets, loss_weights)
        total = torch.zeros((), device=x.device)
        for_x: list[Tensor] = []
        sums: list[Tensor] = []
        for piece in pieces:
            loss, _cross_entropy, for_rows, *parts = kernel.run([*parameters, *piece, z_loss])
            total += loss
            for_x.append(for_rows)
            if len(pieces) == 1:
                sums = parts
            elif not sums:
                # Summed in float32: bf16 sums would lose the small ones.
                sums = [part.float() for part in parts]
            else:
                torch._foreach_add_(sums, parts)
            del parts
        rows = for_x[0] if len(for_x) == 1 else torch.cat(for_x, 1)
        gradients = [rows[:, : targets.numel()].view(x.shape)]
        while sums:
            gradients.append(sums.pop(0).to(x.dtype))
        ctx.gradients = gradients
        ctx.frozen = 1 + len(parameters) - len(gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides its signature
        upstream = grad_outputs[0]
        gradients: list[Tensor] = ctx.gradients
        ctx.gradients = None
        # Scaling by one would read and write the largest gradient of the model for nothing.
        if upstream.is_cuda or upstream.item() != 1.0:
            gradients = [gradient * upstream.to(gradient.dtype) for gradient in gradients]
        return (None, None, None, None, *gradients, *(None,) * ctx.frozen)
