"""The global gradient norm, exact enough to clip by.

The train step shows it to the guard and hands it to the optimizer. It must never know what the
gradients belong to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.compiler.update import PIECE
from penstock.training.parameter_groups import Kernel

_NORM_ROW = 1024
"""Elements summed in one run; longer fp32 sums lose digits: over 38 million elements
torch 2.13's norm on a CPU is off by 8e-4, in rows of 1,024 by 3e-7."""
_NORM_PIECE = 1024 * _NORM_ROW
"""Elements of one call, so that a bf16 gradient's fp32 copy stays in the cache."""


@torch.no_grad()
def global_norm(
    gradients: Sequence[Tensor],
    device: torch.device | None = None,
    squares: Kernel | None = None,
) -> Tensor:
    """Return the Euclidean norm of all gradients together, () float32, with no host sync.

    Sums are fp32 whatever the gradients' dtype. Source: Pascanu et al., arXiv 1211.5063, §3.2.

    Args:
        gradients: tensors of any shape and floating dtype on one device.
        device: where the norm of none, 0, is wanted.
        squares: the kernel of that name (`compiler/update.py`), for gradients in bf16.
    """
    if not gradients:
        return torch.zeros((), device=device)
    if squares is not None and all(gradient.dtype == torch.bfloat16 for gradient in gradients):
        return _norm_by_kernel(gradients, squares)
    if gradients[0].device.type != "cpu":
        by_tensor = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack(by_tensor))
    norms: list[Tensor] = []
    remainders: list[Tensor] = []
    for gradient in gradients:
        flat = gradient.reshape(-1)
        whole = flat.numel() // _NORM_ROW * _NORM_ROW
        norms += [
            torch.linalg.vector_norm(piece.view(-1, _NORM_ROW), dim=1, dtype=torch.float32)
            for piece in flat[:whole].split(_NORM_PIECE)
            if piece.numel()
        ]
        if whole < flat.numel():
            remainders.append(flat[whole:])
    if remainders:
        norms.append(torch.stack(torch._foreach_norm(remainders, 2, dtype=torch.float32)))
    return torch.linalg.vector_norm(torch.cat(norms))


def _norm_by_kernel(gradients: Sequence[Tensor], squares: Kernel) -> Tensor:
    sums: list[Tensor] = []
    for gradient in gradients:
        flat = gradient.reshape(-1)
        pieces = torch.empty(-(-len(flat) // PIECE), dtype=torch.float64)
        sums += squares([flat, pieces])
    return torch.cat(sums).sum().sqrt().float()
