"""Float32 masters of parameters that are held in the compute format.

The optimizers make and keep them. It must never know what a parameter is for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.tensors import Pieces

_PIECE_ELEMENTS = 2 << 20
"""Elements of a master that are joined at a time where it is written: 8 MiB."""


@torch.no_grad()
def make_master(weight: Tensor, exact: Tensor | None) -> Tensor:
    """The float32 value an optimizer updates for `weight`: the weight itself where it is float32.

    `exact`, float32, holds more digits than the weight; it becomes the master as it is, since a
    copy of all of them would be the peak of the run's memory.
    """
    if weight.dtype == torch.float32:
        return weight if exact is None else weight.copy_(exact)
    if exact is not None and exact.dtype == torch.float32 and exact.device == weight.device:
        return exact.contiguous()
    return weight.float() if exact is None else exact.to(weight.device, torch.float32)


def is_split(weight: Tensor) -> bool:
    """Whether a weight's master is held as the weight itself and what rounding took from it: in
    bf16 on a CPU, where memory is short and a fused update is limited by it.
    """
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


@torch.no_grad()
def split(masters: Sequence[Tensor], weights: Sequence[Tensor], rests: Sequence[Tensor]) -> None:
    """Divide float32 `masters` into bf16 `weights` and int16 `rests`; the masters are overwritten.

    A master's bits are those of its weight, 16 zeros behind them, plus its rest, exactly: weights
    are the nearest in bf16, of two equally near ones the larger in magnitude, so that every rest
    fits 16 bits.
    """
    for master, rest in zip(masters, rests, strict=True):
        bits = master.view(torch.int32)
        rest.copy_(bits)  # Its low half, which counts as negative where it is rounded up.
        bits.sub_(rest)
    torch._foreach_copy_(list(weights), list(masters))


@torch.no_grad()
def split_in_pieces(exact: Tensor, weight: Tensor, rest: Tensor, space: Tensor) -> None:
    """Divide a float32 tensor, which stays as it is, into a bf16 `weight` and an int16 `rest` of
    its shape, as much at a time as the float32 `space` (n,) holds.
    """
    size = len(space)
    flat = (tensor.reshape(-1).split(size) for tensor in (exact, weight.view(-1), rest.view(-1)))
    for whole, of_weight, of_rest in zip(*flat, strict=True):
        split([space[: len(whole)].copy_(whole)], [of_weight], [of_rest])


@torch.no_grad()
def join(masters: Sequence[Tensor], weights: Sequence[Tensor], rests: Sequence[Tensor]) -> None:
    """Set float32 `masters` to what `split` has divided."""
    torch._foreach_copy_(list(masters), list(weights))
    for master, rest in zip(masters, rests, strict=True):
        master.view(torch.int32).add_(rest)


def joined(weight: Tensor, rest: Tensor) -> Tensor:
    """A master of its own, float32, of what `split` has divided."""
    master = torch.empty_like(weight, dtype=torch.float32)
    join([master], [weight], [rest])
    return master


def joined_in_pieces(weight: Tensor, rest: Tensor) -> Pieces:
    """The same by some rows at a time, each a tensor of its own while it is used."""
    rows = max(1, _PIECE_ELEMENTS * len(weight) // max(1, weight.numel())) if weight.dim() else 0
    if rows == 0 or rows >= len(weight):
        return Pieces.of(joined(weight, rest))
    pairs = zip(weight.split(rows), rest.split(rows), strict=True)
    return Pieces(tuple(weight.shape), (joined(*pair) for pair in pairs))
