"""What the kernels of `compiler/update.py` compute, as graphs of ATen operators: to read, and to
lower elsewhere. `compiler/build.py` puts them into executables beside the machine code.
"""

import torch
from torch import Tensor

from penstock.compiler.graphs import Graph, trace
from penstock.compiler.update import PIECE, SETTINGS, SQUARES


def trace_update(name: str) -> Graph:
    """The graph of a kernel for tensors of one length."""
    numbers = torch.empty(2 * PIECE, dtype=torch.bfloat16)
    if name == SQUARES:
        return trace(_squares, [numbers, torch.empty(2, dtype=torch.float64)])
    moments = [numbers.float(), numbers.float()]
    rests = numbers.to(torch.int16)
    return trace(_adamw, [numbers, rests, *moments, numbers.clone(), torch.empty(SETTINGS)])


def _adamw(
    weight: Tensor, rest: Tensor, average: Tensor, square: Tensor, gradient: Tensor, given: Tensor
) -> tuple[Tensor, ...]:
    """Weight, rest and moments after an update; all (n,).

    Source: Loshchilov & Hutter, arXiv 1711.05101, algorithm 2.
    """
    keep, size, share, decay_squares, share_squares, root, epsilon, factor = given.unbind()
    gradient = gradient.float() * factor
    average = average + (gradient - average) * share
    square = decay_squares * square + share_squares * gradient * gradient
    master = (weight.float().view(torch.int32) + rest).view(torch.float32)
    master = master * keep - size * average / (square.sqrt() * root + epsilon)
    bits = master.view(torch.int32)
    rest = bits.to(torch.int16)
    weight = (bits - rest).view(torch.float32).to(torch.bfloat16)
    return weight, rest, average, square


def _squares(numbers: Tensor, sums: Tensor) -> tuple[Tensor]:
    """The sum of squares of each `PIECE` numbers, (pieces,) float64."""
    return (numbers.view(-1, PIECE).float().square().sum(1).to(sums.dtype),)
