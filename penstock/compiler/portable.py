"""A traced graph as JSON, one operator a line: to read, to compare, and to lower elsewhere.

Executables carry one for each kernel. Reading one back can only make ATen operators: it runs
nothing, so a graph from anybody may be read. It must never know what a graph computes.

Each node is {"name", "op", "args", "kwargs", "tensor"}: "op" is "input", an operator such as
"aten.mm.default", "getitem" or "output"; "tensor" has its result's dtype, shape and stride. Among
the arguments, {"node": NAME} is an earlier result, and {"dtype": …}, {"device": …}, {"layout": …},
{"memory_format": …} and {"float": "-inf"} are what JSON has no words for.
"""

import json
import keyword
import math
import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from penstock.compiler.kernels import TensorSpec
from penstock.errors import ExecutableError

FORMAT_VERSION = 1
_OPERATOR = re.compile(r"aten\.(\w+)\.(\w+)")
_WORDS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def write_graph(module: fx.GraphModule) -> str:
    """The graph of a module traced to ATen operators, as JSON text."""
    lines = [json.dumps(_node(node)) for node in module.graph.nodes]
    body = ",\n  ".join(lines)
    return f'{{"format_version": {FORMAT_VERSION}, "nodes": [\n  {body}\n]}}\n'


def read_graph(text: str | bytes) -> fx.GraphModule:
    """A module that computes what `write_graph` was given, from tensors in the same order.

    Raises:
        ExecutableError: not such a graph, or an operator that is not ATen's.
    """
    try:
        value = json.loads(text)
        if value["format_version"] != FORMAT_VERSION:
            raise ExecutableError(f"the graph has format version {value['format_version']}")
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}
        for entry in value["nodes"]:
            _add(graph, nodes, entry)
        graph.lint()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ExecutableError(f"this is not a graph: {error!r}") from None
    return fx.GraphModule(torch.nn.Module(), graph)


def _node(node: fx.Node) -> dict[str, Any]:
    if node.op == "output":
        return {"op": "output", "args": _encode(node.args)}
    value = node.meta.get("val")
    tensor = vars(TensorSpec.of(value)) if isinstance(value, Tensor) else None
    if node.op == "placeholder":
        return {"name": node.name, "op": "input", "tensor": tensor}
    return {
        "name": node.name,
        "op": "getitem" if node.target is operator.getitem else str(node.target),
        "args": _encode(node.args),
        "kwargs": {name: _encode(item) for name, item in node.kwargs.items()},
        "tensor": tensor,
    }


def _encode(value: Any) -> Any:  # noqa: ANN401 - any argument of an operator
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for word, kind in _WORDS.items():
        if isinstance(value, kind):
            return {word: str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an operator's argument is a {type(value).__name__}")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:  # noqa: ANN401 - any argument of an operator
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    [(word, text)] = value.items()
    if word == "node":
        return nodes[text]
    if word == "float":
        return float(text)
    if word == "device":
        return torch.device(text)
    found = getattr(torch, text)
    if not isinstance(found, _WORDS[word]):
        raise TypeError(f"{text} is no {word}")
    return found


def _add(graph: fx.Graph, nodes: dict[str, fx.Node], entry: dict[str, Any]) -> None:
    """Append one node."""
    name = _word(entry.get("name", "output"))
    if entry["op"] == "input":
        node = graph.placeholder(name)
    elif entry["op"] == "output":
        graph.output(tuple(_decode(entry["args"], nodes)[0]))
        return
    else:
        kwargs = {_word(key): _decode(item, nodes) for key, item in entry["kwargs"].items()}
        arguments = tuple(_decode(entry["args"], nodes))
        node = graph.call_function(_target(entry["op"]), arguments, kwargs)
        node.name = name
    nodes[name] = node


def _word(name: str) -> str:
    """A name that may stand in the source text torch.fx writes for a graph, where any other text
    would be run as a program.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ExecutableError(f"the graph has the name {name!r:.60}, which is not one")
    return name


def _target(name: str) -> Any:  # noqa: ANN401 - torch's operator type has no stubs
    if name == "getitem":
        return operator.getitem
    match = _OPERATOR.fullmatch(name)
    if match is None:
        raise ExecutableError(f"the graph has the operator {name}, which is not ATen's")
    found = getattr(getattr(torch.ops.aten, match[1]), match[2])
    if not isinstance(found, torch._ops.OpOverload):
        raise TypeError(f"{name} is no operator")
    return found
