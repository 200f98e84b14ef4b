"""Matrix products of a single row as sums of products, for kernels that decode token by token.

`compiler/graphs.py` traces with these rules. With one row, a product reads every weight once and
is limited by memory: Inductor's fused loops over the weights as they lie reach about twice the
bandwidth of the library's matrix product, which is made for many rows (measured on a 2-core Zen 4
in bf16: 34 against 18 GB/s, where plain reading reaches 37).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """(..., 1, K) × (..., K, N) → (..., 1, N) float32."""
    # Taking a stride makes the compiler store the row, instead of computing it for every column.
    rows = rows.contiguous()
    rows = rows.as_strided(rows.shape, rows.stride())
    return (rows.float().transpose(-1, -2) * columns.float()).sum(-2, keepdim=True)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return NotImplemented if a.shape[0] != 1 else _product(a, b).to(a.dtype)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return NotImplemented if a.shape[1] != 1 else _product(a, b).to(a.dtype)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if a.shape[0] != 1 or beta != 1 or alpha != 1:
        return NotImplemented
    return (bias.float() + _product(a, b)).to(a.dtype)


THIN_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten.addmm.default: _addmm,
}
""" Operator → its rule; a rule that does not apply leaves the operator as it is."""
