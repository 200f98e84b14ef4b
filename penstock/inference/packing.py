"""A model's weights in the order in which the native kernel for generation reads them.

`inference/native.py` calls `pack` once per model. The layout is the kernel's: compiler/cpp.
"""

import contextlib
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from penstock.compiler.native import LANES
from penstock.models.architecture import WEIGHT_GROUP
from penstock.models.head import Head
from penstock.models.norm import Norm
from penstock.models.quantization import quantize
from penstock.models.transformer import Block, Transformer

_LINE = 64
"""Bytes of a cache line; every piece starts at one."""
_HUGE_PAGE = 2 << 20
_STEPS = {"fp32": 1, "bf16": 2, "int8": 2}
"""Inputs that one instruction takes, by the format of weights."""


@torch.no_grad()
def pack(model: Transformer, weights: str, *, release: bool) -> tuple[Tensor, Tensor]:
    """Blocks and head in one buffer (bytes) uint8, and where each piece starts, int64; -1: none.

    weights: the format of matrices, bf16, fp32 or int8. With `release` the model's own copy is
    given up block by block, so that the weights are in memory once; embeddings stay.
    """
    modules = [*model.blocks, model.head]
    sizes = (_packed_bytes(p.shape, weights) for m in modules for p in m.parameters())
    buffer = _huge_pages(sum(sizes))
    kept = {model.embed.tokens.weight} if release else set(model.parameters())
    offsets: list[int] = []
    start = 0
    for module in modules:
        for piece in _pieces(module, weights):
            offsets.append(-1 if piece is None else start)
            if piece is not None:
                flat = piece.contiguous().view(-1).view(torch.uint8)
                buffer[start : start + len(flat)] = flat
                start += _up(len(flat), _LINE)
        for parameter in module.parameters():
            if parameter not in kept:
                parameter.data = parameter.new_empty(0)
    return buffer, torch.tensor(offsets)


def pack_matrix(weight: Tensor, weights: str) -> tuple[Tensor, Tensor | None]:
    """A matrix (N, K) in panels, (N / 16, K / step, 16, step), filled up with zeros; for int8 also
    the scales (N / 16, G, 16).
    """
    scale = None
    if weights == "int8":
        weight, scale = quantize(weight)
        scale = _filled(scale, _up(len(scale), LANES), scale.shape[1])
        scale = scale.view(-1, LANES, scale.shape[1]).transpose(1, 2)
    else:
        weight = weight.to(torch.float32 if weights == "fp32" else torch.bfloat16)
    step = _STEPS[weights]
    inputs = _up(weight.shape[1], step)
    panels = _filled(weight, _up(len(weight), LANES), inputs)
    return panels.view(-1, LANES, inputs // step, step).transpose(1, 2), scale


def _pieces(module: nn.Module, weights: str) -> Iterator[Tensor | None]:
    """What the kernel reads of a block or the head, in the order of its structures."""
    if isinstance(module, Block):
        mlp = module.mlp
        yield from _norm(module.attention_norm)
        yield from _linear(module.attention.query_key_value, weights)
        yield from _linear(module.attention.output, weights)
        yield from _norm(module.mlp_norm)
        for linear in (mlp.gate, mlp.up, mlp.down):
            yield from _linear(linear, weights)
    elif isinstance(module, Head):
        vocabulary = module.options.vocab_size
        yield from _norm(module.norm)
        yield from _linear(module.projection, weights, vocabulary)


def _norm(norm: Norm | None) -> Iterator[Tensor | None]:
    for vector in (None, None) if norm is None else (norm.weight, norm.bias):
        yield None if vector is None else vector.float()


def _linear(
    linear: nn.Linear | None, weights: str, outputs: int | None = None
) -> Iterator[Tensor | None]:
    """Weight, scale and bias, of the first `outputs` rows."""
    if linear is None:
        yield from (None, None, None)
        return
    yield from pack_matrix(linear.weight[:outputs], weights)
    bias = dict(linear.named_parameters()).get("bias")
    if bias is None:
        yield None
        return
    row = bias[:outputs].float().unsqueeze(0)
    yield _filled(row, 1, _up(row.shape[1], LANES))


def _packed_bytes(shape: torch.Size, weights: str) -> int:
    """Room for one parameter, its scales included."""
    if len(shape) < 2:
        return _up(4 * _up(shape.numel(), LANES), _LINE)
    outputs, inputs = _up(shape[0], LANES), _up(shape[1], 2)
    element = {"fp32": 4, "bf16": 2, "int8": 1}[weights]
    return _up(element * outputs * inputs, _LINE) + 4 * outputs * -(-inputs // WEIGHT_GROUP)


def _filled(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with zeros behind its rows and columns."""
    result = tensor.new_zeros(rows, columns)
    result[: tensor.shape[0], : tensor.shape[1]] = tensor
    return result


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _huge_pages(size: int) -> Tensor:
    """Zeroed memory (size) uint8 that the system may map in pages of 2 MiB: reading weights through
    4 KiB pages spends a tenth of the time on looking up where they are.
    """
    memory = mmap.mmap(-1, _up(max(size, 1), _HUGE_PAGE))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
