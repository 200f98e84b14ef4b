"""Products of GPT-2 124M's training step, 4 × 512 tokens in bf16: our own against the library's.

For processors with a matrix unit (AMX), where kernels call `compiler/cpp/operators/product.hpp`. Each
product is compiled as a kernel of its own; calls of both are interleaved, on matrices that lie in
memory as a step has them, another set at every call, so that none is left in a core's own caches.

    python benchmarks/products.py
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

ROWS, WIDTH, VOCABULARY = 2048, 768, 50304
LAYERS = {
    "qkv": (WIDTH, 3 * WIDTH),
    "proj": (WIDTH, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
    "logits": (WIDTH, VOCABULARY),
}
KINDS: dict[str, tuple[Callable, Callable]] = {
    "layer": (lambda x, w: x @ w.t(), lambda inputs, outputs: ((ROWS, inputs), (outputs, inputs))),
    "for inputs": (
        lambda g, w: g @ w,
        lambda inputs, outputs: ((ROWS, outputs), (outputs, inputs)),
    ),
    "for weight": (
        lambda g, x: g.t() @ x,
        lambda inputs, outputs: ((ROWS, outputs), (ROWS, inputs)),
    ),
}
"""What is multiplied, and the shapes of what with what."""
SETS = 8


def ours(function: Callable, given: list, workspace: str) -> Callable:
    """A kernel that calls our operator."""
    from penstock.compiler.graphs import trace
    from penstock.compiler.inductor import Inductor
    from penstock.compiler.toolchains import Region

    graph, toolchain = trace(lambda *pair: (function(*pair),), given), Inductor()
    region = Region("product", graph.module, tuple(given), graph.outputs)
    return toolchain.load("product", toolchain.build(region, {"workspace": workspace}))


def measure(contenders: list[Callable], sets: list, calls: int) -> list[list[float]]:
    """Seconds of each call of each contender, by turns, the first of each left out."""
    times: list[list[float]] = [[] for _ in contenders]
    for number in range(calls + 1):
        for call, taken in zip(contenders, times, strict=True):
            began = time.perf_counter()
            call(sets[number % len(sets)])
            taken.append(time.perf_counter() - began)
    return [taken[1:] for taken in times]


def compare(layer: str, kind: str, calls: int, workspace: str) -> None:
    """Print one row."""
    import torch

    (inputs, outputs), (function, shapes) = LAYERS[layer], KINDS[kind]
    is_large = layer == "logits"
    sets = [
        [torch.randn(shape).bfloat16() for shape in shapes(inputs, outputs)]
        for _ in range(1 if is_large else SETS)
    ]
    library = functools.partial(lambda run, pair: run(*pair), function)
    own = ours(function, sets[0], workspace)
    times = measure([own, library], sets, calls // 2 if is_large else calls)
    medians = [statistics.median(taken) * 1e3 for taken in times]
    speed = 2 * ROWS * inputs * outputs / min(times[0]) / 1e9
    print(
        f"| {layer}, {kind} | {medians[0]:.2f} ms | {medians[1]:.2f} ms | "
        f"{medians[1] / medians[0]:.2f}× as fast | {speed:,.0f} |",
        flush=True,
    )


def main() -> None:
    from penstock.hardware.process import prepare_process

    prepare_process()
    from penstock.compiler import operators

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--calls", type=int, default=40, help="of each, half as many of the logits'"
    )
    options = parser.parse_args()
    if not (operators.available() and operators.has_unit()):
        sys.exit("products: our own need a processor with a matrix unit (AMX), and g++")
    print("| product | ours | library's | ours is | GFLOP/s, quickest |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as workspace:
        for layer in LAYERS:
            for kind in KINDS:
                compare(layer, kind, options.calls, workspace)


if __name__ == "__main__":
    main()
