"""Put operators of our own (`compiler/operators.py`) in the place of torch's in a graph.

Inductor's toolchain calls `substitute` in worker processes. Graphs keep their meaning: each operator
computes what the one it replaces does.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from penstock.compiler.operators import BLOCK

_SMALLEST_PRODUCT = 1 << 27
"""Multiplications of a product that is worth packing its factors for."""
_TURNED = (torch.ops.aten.permute.default, torch.ops.aten.t.default, torch.ops.aten.transpose.int)
_SCHEMAS = (
    "attention(Tensor query, Tensor key, Tensor value, bool is_causal, float scale)"
    " -> (Tensor, Tensor)",
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output,"
    " Tensor normalizers, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)",
    "turned_product(Tensor left, Tensor right) -> Tensor",
)
_C_TYPES = {"Tensor": "AtenTensorHandle", "bool": "int32_t", "float": "double"}


def substitute(module: fx.GraphModule) -> dict[Any, list[str]]:
    """Change the graph in place; the operators it calls now, with their declarations in C."""
    operators = _operators()
    used: dict[Any, list[str]] = {}
    for node in list(module.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        found = None if rule is None else rule(node)
        if found is not None:
            name, arguments = found
            node.target, declaration = operators[name]
            node.args, node.kwargs = arguments, {}
            used[node.target] = [declaration]
    module.graph.eliminate_dead_code()
    module.recompile()
    return used


@functools.cache
def _operators() -> dict[str, tuple[Any, str]]:
    """Each operator, made known to torch, and its declaration in C."""
    library = torch.library.Library("penstock", "DEF")  # noqa: TOR901 - kept below
    found: dict[str, tuple[Any, str]] = {}
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.needs_exact_strides,))
        torch.library.register_fake(f"penstock::{name}", _FAKES[name], lib=library)
        operator = getattr(torch.ops.penstock, name).default
        found[name] = operator, _declaration(operator)
    _KEPT.append(library)
    return found


_KEPT: list[Any] = []
"""Torch forgets a library's operators with it."""


def _declaration(operator: Any) -> str:  # noqa: ANN401 - torch's type is not public
    """As `cpp/operators/operators.cpp` defines it."""
    schema = operator._schema
    given = [f"{_C_TYPES[str(a.type)]} {a.name}" for a in schema.arguments]
    given += [f"AtenTensorHandle* result{i}" for i in range(len(schema.returns))]
    name = schema.name.rpartition("::")[2]
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join(given)})"


def _heads(like: Tensor) -> Tensor:
    """(B, H, T, S) that lies as (B, T, H, S)."""
    batch, heads, length, size = like.shape
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _heads(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _attention_backward_fake(
    gradient: Tensor, query: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(query), _heads(query), _heads(query)


def _turned_product_fake(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1])


_FAKES: dict[str, Callable[..., Any]] = {
    "attention": _attention_fake,
    "attention_backward": _attention_backward_fake,
    "turned_product": _turned_product_fake,
}

_Found = tuple[str, tuple[Any, ...]] | None
"""An operator's name and its arguments; None: torch's stays."""


def _attention(node: fx.Node) -> _Found:
    query, key, value, dropout, is_causal = (*node.args, 0.0, False)[:5]
    return _found("attention", node, (query, key, value), dropout, is_causal)


def _attention_backward(node: fx.Node) -> _Found:
    *tensors, dropout, is_causal = node.args[:8]
    return _found("attention_backward", node, tensors, dropout, is_causal)


def _found(name: str, node: fx.Node, tensors: Any, dropout: Any, is_causal: Any) -> _Found:  # noqa: ANN401 - a graph's arguments
    first = tensors[0].meta["val"]
    scale = node.kwargs.get("scale") or first.shape[3] ** -0.5
    fits = all(size % BLOCK == 0 for size in first.shape[2:]) and dropout == 0
    alike = all(_is_dense(t) and t.meta["val"].shape == first.shape for t in tensors[:-1])
    if not (fits and alike) or node.kwargs.get("attn_mask") is not None or len(node.args) > 8:
        return None
    return name, (*tensors, is_causal, scale)


def _turned_product(node: fx.Node) -> _Found:
    """A product whose first factor is read across: a weight's gradient."""
    turned, right = node.args
    if not isinstance(turned, fx.Node) or turned.target not in _TURNED:
        return None
    left = turned.args[0]
    (depth, rows), columns = left.meta["val"].shape, right.meta["val"].shape[1]
    fits = all(size % BLOCK == 0 for size in (depth, rows, columns))
    if not fits or depth * rows * columns < _SMALLEST_PRODUCT:
        return None
    return ("turned_product", (left, right)) if _is_dense(left) and _is_dense(right) else None


def _is_dense(node: Any) -> bool:  # noqa: ANN401 - a graph's argument
    """Whether it is a bf16 tensor whose rows lie in memory as they are."""
    value = node.meta["val"]
    return value.dtype == torch.bfloat16 and value.stride()[-1] == 1


_RULES: dict[Any, Callable[[fx.Node], _Found]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (
        _attention_backward
    ),
    torch.ops.aten.mm.default: _turned_product,
}
