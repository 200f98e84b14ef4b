"""Operators of our own in kernels (`compiler/operators.py`), against float64."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.compiler import operators
from penstock.compiler.graphs import trace
from penstock.compiler.substitution import substitute
from penstock.models.loss import cross_entropy

needs_processor = pytest.mark.skipif(
    not operators.available(), reason="needs a processor with AVX-512 in bf16, and g++"
)
attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CHILD = """
import sys
import torch
from penstock.compiler import operators
if sys.argv[4] == "vectors":  # as on a processor without a matrix unit
    operators.has_unit = lambda: False
    operators.FLAGS = (*operators.FLAGS, "-mno-amx-tile", "-mno-amx-bf16")
sys.path.insert(0, sys.argv[2])
from tests.compiler.test_operators import all_cases
from penstock.compiler.graphs import trace
from penstock.compiler.inductor import Inductor
from penstock.compiler.toolchains import Region

torch.manual_seed(0)
function, inputs = all_cases()
graph = trace(function, inputs)
region = Region("case", graph.module, tuple(inputs), graph.outputs)
toolchain = Inductor()
run = toolchain.load("case", toolchain.build(region, {"workspace": sys.argv[1]}))
outputs = list(run(inputs))
torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
torch.save([inputs, outputs, list(run(inputs))], sys.argv[3])
"""
SHAPES = [  # B, H, T, S, causal
    (2, 3, 64, 64, True),
    (1, 2, 32, 32, True),
    (1, 2, 160, 96, False),
    (2, 1, 288, 64, True),
    (1, 2, 256, 128, False),
]
PRODUCTS = [  # M, K, N; whether the first factor lies turned, the second, and a bias is added
    (1024, 256, 512, True, False, False),
    (96, 2048, 768, True, False, False),
    (3072, 96, 1056, True, False, False),
    (512, 768, 1568, False, True, True),
    (1568, 544, 512, False, True, False),
    (768, 1024, 512, False, False, True),
    (64, 8192, 288, False, False, False),  # summed in three slices
    (2208, 3072, 2240, False, True, False),  # the narrower side packed in two
    (512, 512, 544, True, True, False),
]


def _attention() -> tuple[Callable[..., Any], list[Tensor]]:
    """Forward and backward of all `SHAPES`; each of one projection, and one gradient."""
    inputs: list[Tensor] = []
    for batch, heads, length, size, _ in SHAPES:
        inputs.append(torch.randn(batch, length, 3, heads, size).bfloat16())
        inputs.append(torch.randn(batch, length, heads, size).bfloat16())

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for place, (*_, causal) in enumerate(SHAPES):
            query, key, value = given[2 * place].permute(2, 0, 3, 1, 4)
            output, sums = attention(query, key, value, 0.0, causal)
            upstream = given[2 * place + 1].transpose(1, 2)
            found += [output, sums]
            found += attention_backward(upstream, query, key, value, output, sums, 0.0, causal)
        return tuple(found)

    return function, inputs


def _products() -> tuple[Callable[..., Any], list[Tensor]]:
    """Of `PRODUCTS`, the second factor part of a wider tensor."""
    inputs: list[Tensor] = []
    for rows, depth, columns, left_turned, right_turned, _ in PRODUCTS:
        left, right = torch.randn(rows, depth), torch.randn(depth, columns + 32)
        inputs.append((left.t() if left_turned else left).contiguous().bfloat16())
        inputs.append((right.t() if right_turned else right).contiguous().bfloat16())
        inputs.append(torch.randn(columns).bfloat16())

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for place, (*_, has_bias) in enumerate(PRODUCTS):
            left, right, bias = _factors(given, place)
            found.append(torch.addmm(bias, left, right) if has_bias else left @ right)
        return tuple(found)

    return function, inputs


def _factors(inputs: Sequence[Tensor], place: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one product: (M, K), (K, N), and a bias (N)."""
    left, right, bias = inputs[3 * place : 3 * place + 3]
    *_, left_turned, right_turned, _ = PRODUCTS[place]
    right = right.t() if right_turned else right
    return left.t() if left_turned else left, right[:, 32:], bias


def _cross_entropy() -> tuple[Callable[..., Any], list[Tensor]]:
    """Rows of all magnitudes, one of equal logits; the vocabulary ends within a vector."""
    sizes = torch.logspace(-2, 3, 60).unsqueeze(1)
    rows = torch.cat([torch.randn(60, 256) * sizes, torch.zeros(4, 256)])
    targets = torch.randint(0, 5003, (64,))
    targets[:3] = torch.tensor([5002, 0, 5001])
    weights = torch.rand(64)
    weights[5] = 0
    inputs = [rows.bfloat16(), torch.randn(5056, 256).bfloat16() / 16, targets, weights]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        rows, projection, targets, weights, z_loss = given
        products = rows @ projection.t()
        nll, normalizer, gradient = cross_entropy(products, None, targets, weights, z_loss, 5003)
        return nll, normalizer, gradient @ projection, gradient.clone()

    return function, [*inputs, torch.tensor(0.25)]


def _poisoned() -> tuple[Callable[..., Any], list[Tensor]]:
    """One key, and one row of what is projected, that is not a number."""
    query, key, value = (torch.randn(1, 1, 64, 32).bfloat16() for _ in range(3))
    key[0, 0, 10, 3] = torch.nan
    rows = torch.randn(32, 64).bfloat16()
    rows[3, 7] = torch.nan
    targets, weights = torch.randint(0, 96, (32,)), torch.rand(32)
    inputs = [query, key, value, rows, torch.randn(96, 64).bfloat16(), targets, weights]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        query, key, value, rows, projection, targets, weights, z_loss = given
        output, _ = attention(query, key, value, 0.0, True)
        products = rows @ projection.t()
        nll, _, gradient = cross_entropy(products, None, targets, weights, z_loss, 96)
        return output, nll, gradient.clone()

    return function, [*inputs, torch.tensor(0.0)]


CASES = {
    "poisoned": _poisoned,
    "attention": _attention,
    "products": _products,
    "cross_entropy": _cross_entropy,
}


def all_cases() -> tuple[Callable[..., Any], list[Tensor]]:
    """All cases as one graph, so that one kernel is compiled."""
    made = [make() for make in CASES.values()]
    counts = [len(inputs) for _, inputs in made]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for (case, _), start, count in zip(made, accumulate([0, *counts]), counts, strict=False):
            found += case(*given[start : start + count])
        return tuple(found)

    return function, [tensor for _, inputs in made for tensor in inputs]


Found = dict[str, tuple[list[Tensor], list[Tensor]]]


@pytest.fixture(scope="module", params=["unit", pytest.param("vectors", marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Inputs and outputs of each case as machine code, made in a process of its own."""
    folder = tmp_path_factory.mktemp("operators")
    saved, root = folder / "found.pt", str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), root, str(saved), request.param],
        check=False, capture_output=True, text=True, timeout=600, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    inputs, outputs, again = torch.load(saved, weights_only=True)
    by_case: Found = {}
    for name, make in CASES.items():
        function, given = make()
        count = len(function(*given))
        by_case[name] = inputs[: len(given)], outputs[:count]
        by_case[f"{name}, other threads"] = inputs[: len(given)], again[:count]
        inputs, outputs, again = inputs[len(given) :], outputs[count:], again[count:]
    return by_case


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@needs_processor
def test_attention_and_its_gradients_match_float64(found: Found) -> None:
    inputs, outputs = found["attention"]
    for place, (_, _, length, size, causal) in enumerate(SHAPES):
        packed, upstream = inputs[2 * place : 2 * place + 2]
        leaves = [x.double().requires_grad_() for x in packed.permute(2, 0, 3, 1, 4)]
        query, key, value = leaves
        scores = query @ key.transpose(2, 3) * size**-0.5
        if causal:
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        exact = scores.softmax(-1) @ value
        gradients = torch.autograd.grad(exact, leaves, upstream.transpose(1, 2).double())
        output, sums, *results = outputs[5 * place : 5 * place + 5]
        # Scores, weights and results are in bf16, with 8 bits: 2⁻⁹ each is lost at most.
        assert _error(output, exact.detach()) < 2**-8
        assert (sums.double() - scores.logsumexp(-1)).abs().max() < 1e-5
        assert all(_error(*pair) < 2**-8 for pair in zip(results, gradients, strict=True))


def _has_our_products(request: pytest.FixtureRequest) -> bool:
    return operators.has_unit() and "[unit]" in request.node.name


@needs_processor
def test_products_match_float64(found: Found, request: pytest.FixtureRequest) -> None:
    if not _has_our_products(request):
        pytest.skip("without a matrix unit (AMX) products are the library's")
    inputs, outputs = found["products"]
    for place, result in enumerate(outputs):
        left, right, bias = (x.double() for x in _factors(inputs, place))
        exact = left @ right + (bias if PRODUCTS[place][-1] else 0)
        assert _error(result, exact) < 2**-9, PRODUCTS[place]  # rounded once, to bf16


@needs_processor
def test_cross_entropy_and_its_gradient_match_float64(found: Found) -> None:
    inputs, (nll, normalizer, for_rows, gradient) = found["cross_entropy"]
    rows, projection, targets, weights, z_loss = inputs
    logits = (rows @ projection.t())[:, :5003].double().requires_grad_()  # rounded alike
    log_sum = logits.logsumexp(1)
    exact = log_sum - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    loss = (weights * (exact + z_loss * log_sum.square())).sum()
    (wanted,) = torch.autograd.grad(loss, logits)
    assert (nll - exact).abs().max() < 1e-6 * exact.abs().max()
    assert (normalizer - log_sum).abs().max() < 1e-6 * log_sum.abs().max()
    assert torch.all((gradient[:, :5003] - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6)
    assert gradient[:, 5003:].abs().max() == 0
    assert gradient[5].abs().max() == 0
    assert _error(for_rows, wanted @ projection[:5003].double()) < 2**-7


@needs_processor
def test_results_do_not_depend_on_the_number_of_threads(
    found: Found, request: pytest.FixtureRequest
) -> None:
    for name in CASES if _has_our_products(request) else [*CASES.keys() - {"products"}]:
        pairs = [*zip(found[name][1], found[f"{name}, other threads"][1], strict=True)]
        if name == "cross_entropy":
            pairs.pop(2)  # a product small enough to be the library's
        assert all(torch.equal(*map(torch.nan_to_num, pair)) for pair in pairs), name


@needs_processor
def test_what_is_not_a_number_is_not_lost(found: Found) -> None:
    _, (output, nll, gradient) = found["poisoned"]
    assert output[0, 0, :10].isfinite().all()
    assert output[0, 0, 10:].isnan().all()
    is_wrong = torch.arange(32) == 3
    assert torch.equal(nll.isnan(), is_wrong)
    assert torch.equal(gradient.isnan().all(1), is_wrong)


def _left(function: Callable[..., Any], inputs: Sequence[Tensor]) -> bool:
    """Whether a graph keeps torch's operators."""
    module = trace(function, inputs).module
    names = [str(node.target) for node in module.graph.nodes]
    return not substitute(module) and names == [str(node.target) for node in module.graph.nodes]


def test_what_does_not_fit_stays_torchs() -> None:
    def heads(length: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [torch.randn(1, 2, length, size).to(dtype) for _ in range(3)]

    def attend(*given: Tensor) -> tuple[Tensor, ...]:
        return attention(*given, 0.0, True)

    assert not _left(attend, heads(64, 64))
    assert _left(attend, heads(48, 64))
    assert _left(attend, heads(64, 40))
    assert _left(attend, heads(64, 64, torch.float32))
    assert _left(lambda *given: attention(*given, 0.5, True), heads(64, 64))

    def masked(mask: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return attention(*given, 0.0, False, attn_mask=mask)

    assert _left(masked, [torch.zeros(64, 64).bfloat16(), *heads(64, 64)])

    def product(*given: Tensor) -> tuple[Tensor]:
        return (given[0] @ given[1],)

    def factors(rows: int, depth: int, columns: int) -> list[Tensor]:
        return [torch.randn(rows, depth).bfloat16(), torch.randn(depth, columns).bfloat16()]

    assert _left(product, factors(512, 1024, 512)) != operators.has_unit()
    assert _left(product, factors(512, 1024, 500))
    assert _left(product, factors(64, 64, 64))  # not worth packing
    assert _left(product, [factor.float() for factor in factors(512, 1024, 512)])
    one = [torch.randn(1).bfloat16(), *factors(512, 1024, 512)]  # a bias for all columns
    assert _left(lambda bias, x, y: (torch.addmm(bias, x, y),), one)
    wide, right = factors(512, 2048, 512)
    assert _left(lambda x, y: (x[:, ::2] @ y[::2],), [wide, right])


@pytest.mark.skipif(not operators.has_unit(), reason="needs a matrix unit (AMX)")
def test_every_way_factors_lie_is_ours() -> None:
    module = trace(*_products()).module
    substitute(module)
    names = [str(node.target) for node in module.graph.nodes]
    with_bias = sum(has_bias for *_, has_bias in PRODUCTS)
    assert names.count("penstock.product_and_bias.default") == with_bias
    assert names.count("penstock.product.default") == len(PRODUCTS) - with_bias


def test_logits_that_somebody_else_reads_are_not_overwritten() -> None:
    _, (rows, projection, *others) = _cross_entropy()

    def function(rows: Tensor, projection: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        products = rows @ projection.t()
        return (*cross_entropy(products, None, *others, 5003), products.max())  # type: ignore[arg-type]

    assert _left(function, [rows, projection, *others])
    assert not _left(lambda *given: function(*given)[:3], [rows, projection, *others])


def test_schemas_are_those_of_the_cpp() -> None:
    """Machine code is called as Inductor is told: a difference would read other memory."""
    from penstock.compiler.substitution import _operators

    source = (operators.SOURCES / "operators.cpp").read_text()
    flat = " ".join(source.split())
    for name, (_, declaration) in _operators().items():
        defined = flat.partition(f"AOTITorchError aoti_torch_cpu_{name}(")[2].partition(")")[0]
        told = declaration.partition("(")[2].removesuffix(")")
        types = [[part.rpartition(" ")[0] for part in text.split(", ")] for text in (defined, told)]
        assert types[0] == types[1], json.dumps(types)
