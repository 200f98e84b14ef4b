"""Graphs as JSON: they compute what the machine code beside them computes, and cannot do harm."""

import json
from pathlib import Path

import pytest
import torch

from penstock.compiler.executable import Executable
from penstock.compiler.kernels import TensorSpec
from penstock.compiler.portable import read_graph, write_graph
from penstock.errors import ExecutableError
from tests.numerics import assert_matches

KERNELS = [
    *("embed_forward", "embed_backward", "block_forward", "block_backward"),
    *("head_train", "head_evaluate"),
]


def tensor_for(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.dtype == "int64":
        return torch.randint(0, 512, spec.shape, generator=generator)
    values = torch.rand(spec.shape, generator=generator) / 8
    return torch.empty_strided(spec.shape, spec.stride).copy_(values)


@pytest.mark.parametrize("name", KERNELS)
def test_a_graph_computes_what_its_kernel_computes(tiny_executable: Path, name: str) -> None:
    executable = Executable.open(tiny_executable)
    kernel = executable.kernels()[name].run
    module = read_graph(executable.members[f"graphs/{name}.json"])
    generator = torch.Generator().manual_seed(1)
    inputs = [tensor_for(spec, generator) for spec in kernel.spec.inputs]
    expected, actual = module(*inputs), kernel(inputs)
    assert len(expected) == len(actual) == len(kernel.spec.outputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_matches(ours, theirs, 1e-4)


def test_a_graph_that_is_read_is_written_the_same() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor]:
        halves = torch.split(x, 2)
        return (torch.where(halves[0] > 0, halves[1], float("-inf")).to(torch.float64),)

    from penstock.compiler.graphs import trace

    text = write_graph(trace(function, [torch.ones(4, 3)]).module)
    again = json.loads(write_graph(read_graph(text)))
    for node, original in zip(again["nodes"], json.loads(text)["nodes"], strict=True):
        original.pop("tensor", None)
        node.pop("tensor", None)
        assert node == original
    x = torch.randn(4, 3)
    assert torch.equal(read_graph(text)(x)[0], function(x)[0])


def test_names_cannot_smuggle_in_code(tmp_path: Path) -> None:
    """torch.fx puts the names of a graph into source text, which it runs."""
    mark = tmp_path / "ran"
    for field in ("name", "kwargs"):
        code = f"a=open({str(mark)!r}, 'w')"
        fields = {"name": code} if field == "name" else {
            "op": "aten.full.default", "args": [[1], 1], "kwargs": {code + ", b": 1},
        }  # fmt: skip
        with pytest.raises(ExecutableError, match="is not one"):
            read_graph(node(**fields))
    assert not mark.exists()


def node(**fields: object) -> str:
    entry = {"name": "x", "op": "input", "tensor": None} | fields
    return json.dumps({"format_version": 1, "nodes": [entry, {"op": "output", "args": [[]]}]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format_version": 2, "nodes": []}',
        node(op="os.system", args=["true"], kwargs={}),
        node(op="aten.nothing.default", args=[], kwargs={}),
        node(op="aten.__class__.__init__", args=[], kwargs={}),
        node(op="aten.add.Tensor", args=[{"node": "y"}], kwargs={}),
        node(op="aten.full.default", args=[[1], {"dtype": "load"}], kwargs={}),
        node(op="aten.full.default", args=[[1], {"eval": "1"}], kwargs={}),
        node(op="aten.full.default", args=[[1], {"dtype": "a", "device": "b"}], kwargs={}),
        node(op="aten.full.default", args=[[1], {"device": "nowhere"}], kwargs={}),
        node(name=None),
        node(name="x=print(1)"),
        node(name="x):\n    import os\ndef f(y"),
        node(name="lambda"),
        node(op="aten.full.default", args=[[1]], kwargs={"fill_value=print(1), out": 1}),
        '{"format_version": 1, "nodes": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ExecutableError, match=r"graph"):
        read_graph(text)
