"""Cut a region's backward graph in two: the gradient of its input, and later those of its weights.

`regions.py` and `split_regions.py` ask for the parts under the zero-bubble schedule. It knows
nothing of transformers, files or machine code.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, fx

from penstock.compiler.graphs import (
    VIEWS,
    ForwardBackward,
    Graph,
    ancestors,
    extract,
    frontier,
    operator_name,
)

Part = Literal["input", "weights"]


@dataclasses.dataclass(frozen=True)
class BackwardPart:
    """A graph that gives a part of the gradients, and where its inputs come from.

    `taken` counts through the inputs of the whole backward graph, and on through what the
    input's part hands over: that gives the input's gradient first and the handed over behind.
    `differentiable` lists the region's inputs whose gradients the part gives.
    """

    graph: Graph
    taken: tuple[int, ...]
    differentiable: tuple[int, ...]


def backward_part(pair: ForwardBackward, part: Part, place: int) -> BackwardPart:
    """One of the two parts of `pair.backward`; `place` is that of the one input that is no weight.

    Both parts compute what depends on no gradient, such as the results of norms, from what the
    forward pass has saved. What the input's part computes from gradients is handed over where the
    gradients of weights leave it: at the outputs of the matrix products and of norms.
    """
    module = pair.backward.module
    given: list[fx.Node] = list(module.graph.find_nodes(op="placeholder"))
    gradients: list[fx.Node] = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
    for_input = gradients[pair.differentiable.index(place)]
    for_weights = [gradient for gradient in gradients if gradient is not for_input]
    apart = ancestors([for_input]) & _descendants(module.graph, given[-pair.output_count :])
    movable = {node for node in apart if node not in given and not _is_only_rearranged(node)}
    cut = frontier(for_weights, {*given, *movable}) & movable
    handed = [node for node in module.graph.nodes if node in cut]
    outputs = [for_input, *handed] if part == "input" else for_weights
    row = given if part == "input" else [*given, *handed]
    read = frontier(outputs, set(row))
    taken = [node for node in row if node in read]
    return BackwardPart(
        extract(module, taken, outputs),
        tuple(row.index(node) for node in taken),
        tuple(i for i in pair.differentiable if (i == place) == (part == "input")),
    )


def _descendants(graph: fx.Graph, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """All nodes that are computed from `nodes`, themselves included."""
    found = set(nodes)
    for node in graph.nodes:  # in the order in which they are computed
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_only_rearranged(node: fx.Node) -> bool:
    """Whether what it is made of can be handed over as well: the same numbers in no more bytes.

    Also an operator's several results together, which are handed over one by one.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return True
    if operator_name(node.target) not in (*VIEWS, "_to_copy"):
        return False
    (source,) = node.all_input_nodes
    before = source.meta.get("val")
    return isinstance(before, Tensor) and _bytes(before) <= _bytes(value)


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
