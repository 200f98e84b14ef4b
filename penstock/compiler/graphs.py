"""Cut one region's joint forward-and-backward trace into two graphs.

`compiler/regions.py` calls this with a function on tensors; toolchains lower the graphs it
returns. It knows nothing about transformers, files or machine code.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from penstock.compiler.gelu import GELU_BY_EXPONENTIAL
from penstock.compiler.thin import THIN_PRODUCTS
from penstock.config.recompute import Kept

_KEPT_OPERATORS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "logsumexp",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""Operators whose outputs the backward graph is given rather than computing them again: matrix
products and attention cost far more time than their outputs cost memory. Everything between them
is element-wise or a short reduction, which the backward kernels recompute in registers."""

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_STATISTICS = ("native_layer_norm", "rsqrt")
"""Operators of norms whose small results are kept when nothing is to be computed twice."""
VIEWS = (
    "view",
    "_unsafe_view",
    "reshape",
    "permute",
    "transpose",
    "t",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "clone",
    "split",
    "split_with_sizes",
    "unbind",
)
"""Operators that give the same numbers in another arrangement."""

_UNDECOMPOSED = (
    "logsumexp",
    "_scaled_dot_product_flash_attention_for_cpu",
    "addmm",
    "native_dropout",
)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A straight-line tensor program with fixed shapes, and its example inputs (fake)."""

    module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class ForwardBackward:
    """A region cut in two.

    `forward` maps the region's inputs to (outputs…, saved…). `backward` maps (kept inputs…,
    saved…, gradients of the outputs…) to the gradients of the differentiable inputs.
    """

    forward: Graph
    backward: Graph
    output_count: int
    kept_inputs: tuple[int, ...]
    differentiable: tuple[int, ...]


def trace(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], *, thin: bool = False
) -> Graph:
    """Trace `function` on fake or real tensors into a graph of ATen operators.

    `thin` turns products of a single row into sums: see `compiler/thin.py`.
    """
    module = make_fx(
        lambda *args: tuple(function(*args)),
        tracing_mode="fake",
        decomposition_table=_decompositions() | (THIN_PRODUCTS if thin else {}),
    )(*inputs)
    return _graph(module)


def trace_joint(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    differentiable: Sequence[int],
    output_count: int,
    kept: Kept = "products",
) -> ForwardBackward:
    """Trace `function` and its vector-Jacobian product, and cut the trace in two.

    `function` maps `inputs` to `output_count` tensors; `differentiable` lists the positions of
    the inputs that get gradients. The cut keeps what `_KEPT_OPERATORS` produce, or also what goes
    into matrix products.
    """

    def joint(*args: Tensor) -> tuple[Tensor, ...]:
        primals, tangents = args[: len(inputs)], args[len(inputs) :]
        leaves = [
            p.detach().requires_grad_() if i in differentiable else p for i, p in enumerate(primals)
        ]
        with torch.enable_grad():
            outputs = tuple(function(*leaves))
        gradients = torch.autograd.grad(outputs, [leaves[i] for i in differentiable], tangents)
        return (*outputs, *gradients)

    with torch.no_grad():
        tangents = [torch.empty_like(output) for output in function(*inputs)]
    traced = trace(joint, [*inputs, *tangents])
    return _cut(traced.module, len(inputs), output_count, tuple(differentiable), kept)


def leave_rows(graph: Graph, output: int) -> Graph:
    """A graph whose output of this number, a table's gradient, is left as the rows (…, E) float32
    that would be added up in it, for whoever calls the kernel to add.
    """
    end = graph.module.graph.output_node()
    outputs = list(end.args[0])  # type: ignore[arg-type]
    table = outputs[output]
    while operator_name(table.target) == "_to_copy":
        table = table.args[0]
    if operator_name(table.target) != "index_put":
        raise ValueError(f"{table.target} adds up no rows")
    with graph.module.graph.inserting_before(end):
        rows = graph.module.graph.call_function(torch.ops.aten.clone.default, (table.args[2],))
    rows.meta["val"] = table.args[2].meta["val"].clone()
    outputs[output] = rows
    end.args = (tuple(outputs),)
    return _graph(graph.module)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Core ATen decompositions and GELU's, less those that take attention and matmul apart."""
    table = core_aten_decompositions()
    kept = {
        operator: rule
        for operator, rule in table.items()
        if operator_name(operator) not in _UNDECOMPOSED
    }
    return kept | GELU_BY_EXPONENTIAL


def operator_name(target: object) -> str:
    """The operator's name without namespace and overload, such as "mm"."""
    packet = getattr(target, "overloadpacket", None)
    return getattr(packet, "__name__", "")


def _cut(
    joint: fx.GraphModule,
    input_count: int,
    output_count: int,
    differentiable: tuple[int, ...],
    keeps: Kept,
) -> ForwardBackward:
    """Cut a joint graph into forward and backward at the values that `keeps` says."""
    graph = joint.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    primals, tangents = placeholders[:input_count], placeholders[input_count:]
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    outputs, gradients = results[:output_count], results[output_count:]

    forward_nodes = ancestors(outputs)
    kept = [node for node in graph.nodes if _is_kept(node, forward_nodes, keeps)]
    needed = frontier(gradients, {*primals, *tangents, *kept})
    kept_inputs = [node for node in primals if node in needed]
    saved = [node for node in kept if node in needed]

    forward = extract(joint, primals, [*outputs, *saved])
    backward = extract(joint, [*kept_inputs, *saved, *tangents], gradients)
    return ForwardBackward(
        forward=forward,
        backward=backward,
        output_count=output_count,
        kept_inputs=tuple(primals.index(node) for node in kept_inputs),
        differentiable=differentiable,
    )


def _is_kept(node: fx.Node, forward_nodes: set[fx.Node], keeps: Kept) -> bool:
    """Whether a node's value is saved for the backward graph, should that read it.

    An operator with several results (attention and its log-sum-exp) is kept by its parts, also
    those that only the backward graph reads.
    """
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    producer = node
    if getattr(node.target, "__name__", "") == "getitem":
        producer = node.all_input_nodes[0]
    if producer not in forward_nodes:
        return False
    name = operator_name(producer.target)
    if name in _KEPT_OPERATORS or keeps == "products":
        return name in _KEPT_OPERATORS
    return name in _STATISTICS or (name not in VIEWS and _feeds_a_product(node, forward_nodes))


def _feeds_a_product(node: fx.Node, forward_nodes: set[fx.Node]) -> bool:
    """Whether a forward matrix product reads a value, or a view of it."""
    return any(
        user in forward_nodes
        and (
            operator_name(user.target) in _PRODUCTS
            or (operator_name(user.target) in VIEWS and _feeds_a_product(user, forward_nodes))
        )
        for user in node.users
    )


def ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """All nodes that `nodes` are computed from, themselves included."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def frontier(nodes: Sequence[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
    """Members of `given` that computing `nodes` reads when it stops at `given`."""
    reached: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in given:
            reached.add(node)
        else:
            pending.extend(node.all_input_nodes)
    return reached


def extract(joint: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Graph:
    """Copy the part of `joint` that computes `outputs` from `inputs` into a graph of its own."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    reached = _between(outputs, set(inputs))
    for node in joint.graph.nodes:
        if node in reached and node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in outputs))
    graph.lint()
    return _graph(fx.GraphModule(joint, graph))


def _between(outputs: Sequence[fx.Node], inputs: set[fx.Node]) -> set[fx.Node]:
    """Nodes to compute `outputs` from `inputs`, ends included."""
    found: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node not in inputs:
                pending.extend(node.all_input_nodes)
    return found


def _graph(module: fx.GraphModule) -> Graph:
    """Wrap a traced module with its example inputs and outputs, less the no-op aliases."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    inputs = tuple(node.meta["val"] for node in module.graph.find_nodes(op="placeholder"))
    outputs = tuple(node.meta["val"] for node in module.graph.output_node().args[0])  # type: ignore[union-attr]
    return Graph(module, inputs, outputs)
