"""GELU by one exponential, in traced graphs, against its definition in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.compiler.graphs import trace, trace_joint


def gelu(x: Tensor) -> tuple[Tensor]:
    return (F.gelu(x, approximate="tanh"),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_definition(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -1e4, 1e4])]).to(dtype)
    upstream = torch.linspace(-2, 2, len(x)).to(dtype)
    cut = trace_joint(gelu, [x], [0], 1)
    value, *saved = cut.forward.module(x)
    kept = [x for _ in cut.kept_inputs]
    (gradient,) = cut.backward.module(*kept, *saved, upstream)

    exact = x.double().requires_grad_()
    inner = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)
    expected = 0.5 * exact * (1 + torch.tanh(inner))
    expected.backward(upstream.double())
    digits = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(value.double(), expected.detach(), rtol=digits, atol=digits)
    assert exact.grad is not None
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=digits, atol=digits)
    names = {str(node.target) for node in cut.forward.module.graph.nodes}
    assert "aten.exp.default" in names
    assert not {name for name in names if "gelu" in name or "tanh" in name}


def test_the_exact_kind_is_left_alone() -> None:
    names = {
        str(n.target) for n in trace(lambda x: (F.gelu(x),), [torch.ones(3)]).module.graph.nodes
    }
    assert "aten.gelu.default" in names


def test_other_rules_stay() -> None:
    def look_up(table: Tensor, tokens: Tensor) -> tuple[Tensor]:
        return (F.embedding(tokens, table),)

    cut = trace_joint(look_up, [torch.randn(5, 3), torch.tensor([1, 4, 1])], [0], 1)
    assert "aten.embedding_dense_backward.default" not in {
        str(node.target) for node in cut.backward.module.graph.nodes
    }
