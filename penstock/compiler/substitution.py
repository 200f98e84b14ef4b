"""Put operators of our own (`compiler/operators.py`) in the place of torch's in a graph.

Inductor's toolchain calls `substitute` in worker processes. Graphs keep their meaning: an operator
computes what it replaces.
"""

import functools
import math
from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

from penstock.compiler.graphs import Graph, trace
from penstock.compiler.operators import BLOCK, has_unit
from penstock.models.loss import cross_entropy

_SMALLEST_PRODUCT = 1 << 27
"""Multiplications of a product that is worth packing its factors for."""
_SCHEMAS = (
    "attention(Tensor query, Tensor key, Tensor value, bool is_causal, float scale)"
    " -> (Tensor, Tensor)",
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output,"
    " Tensor normalizers, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)",
    "product(Tensor left, Tensor right) -> Tensor",
    "product_and_bias(Tensor left, Tensor right, Tensor bias) -> Tensor",
    "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor weights, Tensor z_loss,"
    " int vocabulary) -> (Tensor, Tensor)",
)
_C_TYPES = {"Tensor": "AtenTensorHandle", "bool": "int32_t", "float": "double", "int": "int64_t"}


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
    for node in _cross_entropies(module):
        used[node.target] = [operators["cross_entropy_"][1]]
    module.graph.eliminate_dead_code()
    module.recompile()
    return used


@functools.cache
def _operators() -> dict[str, tuple[Any, str]]:
    """Each operator, made known to torch, and its declaration in C."""
    library = _library()
    found: dict[str, tuple[Any, str]] = {}
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.needs_exact_strides,))
        torch.library.register_fake(f"penstock::{name}", _FAKES[name], lib=library)
        operator = getattr(torch.ops.penstock, name).default
        found[name] = operator, _declaration(operator)
    return found


@functools.cache  # torch forgets a library's operators with it
def _library() -> torch.library.Library:
    return torch.library.Library("penstock", "DEF")


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
    batch, heads, length, _ = query.shape
    normalizers = query.new_empty(batch, length, heads, dtype=torch.float32).transpose(1, 2)
    return _heads(query), normalizers


def _attention_backward_fake(
    gradient: Tensor, query: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(query), _heads(query), _heads(query)


def _product_fake(left: Tensor, right: Tensor, *others: object) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _cross_entropy_fake(logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    made = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return made, torch.empty_like(made)


_FAKES: dict[str, Callable[..., Any]] = {
    "attention": _attention_fake,
    "attention_backward": _attention_backward_fake,
    "product": _product_fake,
    "product_and_bias": _product_fake,
    "cross_entropy_": _cross_entropy_fake,
}

_Found = tuple[str, tuple[Any, ...]] | None
"""An operator's name and its arguments; None: torch's stays."""


def _attention(node: fx.Node) -> _Found:
    given: tuple[Any, ...] = node.args
    query, key, value, dropout, is_causal = (*given, *(0.0, False)[len(given) - 3 :])
    return _found("attention", node, (query, key, value), dropout, is_causal)


def _attention_backward(node: fx.Node) -> _Found:
    given: tuple[Any, ...] = node.args
    *tensors, dropout, is_causal = given[:8]
    return _found("attention_backward", node, tensors, dropout, is_causal)


def _found(name: str, node: fx.Node, tensors: Any, dropout: Any, is_causal: Any) -> _Found:  # noqa: ANN401 - a graph's arguments
    first = tensors[0].meta["val"]
    scale = node.kwargs.get("scale") or first.shape[3] ** -0.5
    fits = all(size % BLOCK == 0 for size in first.shape[2:]) and dropout == 0
    alike = all(_is_dense(t) and t.meta["val"].shape == first.shape for t in tensors[:-1])
    if not (fits and alike) or node.kwargs.get("attn_mask") is not None or len(node.args) > 8:
        return None
    return name, (*tensors, is_causal, scale)


def _product(node: fx.Node) -> _Found:
    given: Any = node.args
    return ("product", given) if _pays(*given) else None


def _product_and_bias(node: fx.Node) -> _Found:
    given: Any = node.args
    bias, *factors = given
    # A bias of one number, which is added to every column, is not read as a row of them.
    is_row = bias.meta["val"].shape == node.meta["val"].shape[1:] and _is_dense(bias)
    if not is_row or any(node.kwargs.values()) or not _pays(*factors):
        return None
    return "product_and_bias", (*factors, bias)


def _pays(left: Any, right: Any) -> bool:  # noqa: ANN401 - a graph's arguments
    """Whether a product can be ours here, and is large enough."""
    sizes = (*left.meta["val"].shape, right.meta["val"].shape[1])
    fits = has_unit() and all(size % BLOCK == 0 for size in sizes)
    if not fits or math.prod(sizes) < _SMALLEST_PRODUCT:
        return False
    return all(_is_dense(factor) or _is_turned(factor) for factor in (left, right))


def _is_dense(node: Any) -> bool:  # noqa: ANN401 - a graph's argument
    """Whether it is a bf16 tensor whose rows lie in memory as they are."""
    value = node.meta["val"]
    return value.dtype == torch.bfloat16 and value.stride()[-1] == 1


def _is_turned(node: Any) -> bool:  # noqa: ANN401 - a graph's argument
    """Whether it is a bf16 matrix whose columns do."""
    value = node.meta["val"]
    return value.dtype == torch.bfloat16 and value.stride()[0] == 1


_RULES: dict[Any, Callable[[fx.Node], _Found]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (
        _attention_backward
    ),
    torch.ops.aten.mm.default: _product,
    torch.ops.aten.addmm.default: _product_and_bias,
}


def _cross_entropies(module: fx.GraphModule) -> list[fx.Node]:
    """Replace what `loss.cross_entropy` computes of bf16 products, in their place; the calls."""
    operator = _operators()["cross_entropy_"][0]
    products = (torch.ops.aten.mm.default, _operators()["product"][0])
    made: list[fx.Node] = []
    for limit in module.graph.find_nodes(op="call_function", target=torch.ops.aten.lt.Scalar):
        masked = next(iter(limit.users))
        shape, vocabulary = masked.meta["val"].shape, limit.args[1]
        if len(shape) != 2 or not isinstance(vocabulary, int):
            continue
        pattern = _cross_entropy_graph(shape[0], shape[1], vocabulary)
        for match in SubgraphMatcher(pattern.module.graph).match(module.graph):
            logits, targets, weights, z_loss = match.placeholder_nodes
            is_product = logits.target in products
            if not is_product or not {*logits.users} <= {*match.nodes_map.values()}:
                continue  # somebody else reads what would be overwritten
            with module.graph.inserting_before(match.returning_nodes[0]):
                given = (logits, targets, weights, z_loss, vocabulary)
                call = module.graph.call_function(operator, given)
                parts = [module.graph.call_function(getitem, (call, index)) for index in range(2)]
            for old, new in zip(match.returning_nodes, (*parts, logits), strict=True):
                old.replace_all_uses_with(new)
            made.append(call)
    return made


def _cross_entropy_graph(rows: int, width: int, vocabulary: int) -> Graph:
    """The function to look for, for these sizes."""
    with FakeTensorMode():
        given = [
            torch.empty(rows, width, dtype=torch.bfloat16),
            torch.empty(rows, dtype=torch.int64),
            torch.empty(rows),
            torch.empty(()),
        ]
        return trace(lambda x, t, w, z: cross_entropy(x, None, t, w, z, vocabulary), given)
