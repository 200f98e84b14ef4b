"""Gradients of inputs and of weights in passes of their own, through a kernel of each."""

import contextlib
import gc
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import penstock
from penstock.compiler import operators
from penstock.compiler.executable import Executable
from penstock.compiler.memory import MemoryModel
from penstock.compiler.planner import make_plan
from penstock.compiler.regions import trace_kernel
from penstock.compiler.runtime import attach
from penstock.config.planning import PlanSection
from penstock.config.schema import BatchSection, ModelSection
from penstock.hardware.target import load_target
from penstock.models.resolve import resolve_architecture
from penstock.models.rotary import rotation
from penstock.models.transformer import Transformer
from penstock.spans import recording
from tests.compiler.test_family_kernels import model_for
from tests.numerics import assert_matches

LAYERS = 3
INPUT, WEIGHTS, WHOLE = (f"block_backward{part}" for part in ("_input", "_weights", ""))


def compiled(folder: Path, preset: str, **more: Any) -> Executable:
    path = folder / "apart.penstock"
    values: dict[str, Any] = {
        "model": {"preset": preset, "dropout": more.pop("dropout", 0.1)},
        "batch": {"micro": 3},
        "data": {"sequence_length": 48},
        "precision": {"compute": "fp32"},
        "plan": {"schedule": "zero-bubble", **more.pop("plan", {})},
        "compile": {"toolchain": "eager"},
    }
    penstock.compile(**{**values, **more}, executable=path)
    return Executable.open(path)


class Blocks:
    """A stage of nothing but blocks, and what goes in."""

    def __init__(self, executable: Executable) -> None:
        self.model: Transformer = model_for(executable, LAYERS)
        self.model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[executable.plan.compute])
        self.length = executable.plan.sequence_length
        shape = (3, self.length, self.model.architecture.hidden_size)
        generator = torch.Generator().manual_seed(3)
        dtype = next(self.model.parameters()).dtype
        self.x, self.upstream = (
            torch.randn(shape, generator=generator).to(dtype) for _ in range(2)
        )
        self.x.requires_grad_()

    def attached(self, executable: Executable, stages: int, recompute: str) -> "Blocks":
        attach(self.model, executable.kernels(), recompute=recompute, stages=stages)
        return self

    def output(self) -> Tensor:
        a = self.model.architecture
        keys = self.model.dropout_keys(0, 5, torch.arange(3))
        segments = None if a.is_causal else torch.zeros(3, self.length, dtype=torch.int64)
        rows = 1 if segments is None else 3
        turns = rotation(a, torch.arange(self.length).expand(rows, -1))
        x = self.x
        for index, block in enumerate(self.model.blocks):
            x = block(x, None if keys is None else keys[index + 1], turns, segments)
        return x

    def at_once(self) -> list[Tensor]:
        self.output().backward(self.upstream)
        return self.gradients()

    def apart(self) -> list[Tensor]:
        """As torch's pipelines do it under zero-bubble."""
        output = self.output()
        parameters = list(self.model.blocks.parameters())
        _, groups = stage_backward_input([output], [self.upstream], [self.x], iter(parameters))
        assert all(parameter.grad is None for parameter in parameters)
        stage_backward_weight(iter(parameters), groups)
        return self.gradients()

    def gradients(self) -> list[Tensor]:
        trained = [p for p in self.model.blocks.parameters() if p.requires_grad]
        found = [self.x.grad, *(parameter.grad for parameter in trained)]
        return [gradient for gradient in found if gradient is not None]


def assert_the_same_apart(executable: Executable, recompute: str, tolerance: float) -> None:
    plain = Blocks(executable).at_once()
    whole = Blocks(executable).attached(executable, 1, recompute).at_once()
    apart = Blocks(executable).attached(executable, 2, recompute)
    assert len(plain) == len(whole) == 1 + len(list(apart.model.blocks.parameters()))
    for found in (apart.apart(), Blocks(executable).attached(executable, 2, recompute).at_once()):
        for ours, theirs, reference in zip(found, whole, plain, strict=True):
            assert_matches(ours, theirs, tolerance)
            assert_matches(ours, reference, 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not operators.available(), reason="needs a processor with AVX-512 in bf16")
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_gradients_apart_are_those_at_once_with_operators_of_our_own(
    recompute: str, tmp_path: Path
) -> None:
    executable = compiled(
        tmp_path,
        "",
        model={"preset": "llama-tiny", "heads": 2, "kv_heads": 1, "dropout": 0.0},
        data={"sequence_length": 64},
        precision={"compute": "bf16"},
        plan={"recompute": recompute},
        compile={"toolchain": "inductor"},
    )
    assert "flash" in executable.members["graphs/block_backward_input.json"].decode()
    exact = Blocks(executable)
    exact.model.double()
    exact.x = exact.x.detach().double().requires_grad_()
    exact.upstream = exact.upstream.double()
    wanted, plain = exact.at_once(), Blocks(executable).at_once()
    found = Blocks(executable).attached(executable, 2, recompute).apart()
    assert len(found) == len(plain) == len(wanted)
    for ours, eager, reference in zip(found, plain, wanted, strict=True):
        errors = [(x.double() - reference).norm() / reference.norm() for x in (ours, eager)]
        assert 0 < errors[0] < 1.2 * errors[1] < 0.1  # rounded less often than without kernels


# Two in every run; the others take as long again each.
PRESETS = [
    "gpt2-tiny",
    "llama-tiny",
    *(
        pytest.param(f"{name}-tiny", marks=pytest.mark.slow)
        for name in ("gpt-j", "pythia", "bert", "roberta", "distilbert")
    ),
]


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_apart_are_those_at_once_bit_for_bit(preset: str, tmp_path: Path) -> None:
    executable = compiled(tmp_path, preset)
    for recompute in ("selective", "every-2"):
        assert_the_same_apart(executable, recompute, 0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_so_are_they_where_nothing_is_computed_twice(preset: str, tmp_path: Path) -> None:
    assert_the_same_apart(compiled(tmp_path, preset, plan={"recompute": "none"}), "none", 0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS[:2])
def test_machine_code_gives_them_within_rounding(preset: str, tmp_path: Path) -> None:
    executable = compiled(tmp_path, preset, compile={"toolchain": "inductor"})
    for recompute in ("selective", "blocks"):
        assert_the_same_apart(executable, recompute, 1e-6)


def test_each_kernel_runs_once_a_pass(tmp_path: Path) -> None:
    executable = compiled(tmp_path, "gpt2-tiny")
    for recompute, forward in (("selective", LAYERS), ("blocks", 2 * LAYERS)):
        with counted() as apart:
            Blocks(executable).attached(executable, 2, recompute).apart()
        assert apart == {"block_forward": forward, INPUT: LAYERS, WEIGHTS: LAYERS}
        with counted() as at_once:
            Blocks(executable).attached(executable, 2, recompute).at_once()
        assert at_once == {"block_forward": forward, WHOLE: LAYERS}


def test_a_block_of_which_nothing_is_trained_has_no_second_pass(tmp_path: Path) -> None:
    executable = compiled(tmp_path, "gpt2-tiny")
    blocks = Blocks(executable)
    blocks.model.blocks[1].requires_grad_(False)
    expected = blocks.at_once()
    again = Blocks(executable).attached(executable, 2, "selective")
    again.model.blocks[1].requires_grad_(False)
    with counted() as calls:
        found = again.apart()
    assert calls == {"block_forward": LAYERS, INPUT: LAYERS, WEIGHTS: LAYERS - 1}
    for ours, reference in zip(found, expected, strict=True):
        assert_matches(ours, reference, 1e-4)


@pytest.mark.parametrize("recompute", ["selective", "blocks"])
def test_what_waits_between_the_passes_is_given_up_with_the_last(
    recompute: str, tmp_path: Path
) -> None:
    executable = compiled(tmp_path, "gpt2-tiny")
    blocks = Blocks(executable).attached(executable, 2, recompute)
    parameters = list(blocks.model.blocks.parameters())
    with Storages([*parameters, blocks.x, blocks.upstream]) as storages:
        output = blocks.output()
        forward = storages.alive()
        _, groups = stage_backward_input([output], [blocks.upstream], [blocks.x], iter(parameters))
        between = storages.alive()
        stage_backward_weight(iter(parameters), groups)
        after = storages.alive()
    kernels = executable.manifest["kernels"]
    stream = 4 * 3 * 48 * blocks.model.architecture.hidden_size
    keys = 8 * 3 * blocks.model.architecture.dropout_sites
    saved = _bytes(kernels["block_forward"]["spec"]["outputs"][1:])
    held = 0 if recompute == "blocks" else saved
    # The output of each block is the next one's input; the last one's is the stage's.
    assert forward - LAYERS * (stream + held) in range(LAYERS * keys + 1)
    first = len(kernels[WHOLE]["contract"]["kept_inputs"])
    taken = kernels[WEIGHTS]["contract"]["taken"]
    waiting = [
        spec
        for index, spec in zip(taken, kernels[WEIGHTS]["spec"]["inputs"], strict=True)
        if index >= first
    ]
    # The gradients of each block's output and of what comes in, less the one that was given.
    assert between - LAYERS * (2 * stream + _bytes(waiting)) in range(LAYERS * keys + 1)
    sums = sum(parameter.numel() * 4 for parameter in parameters)
    assert after - sums - 2 * stream in range(LAYERS * keys + 1)


@pytest.mark.parametrize("recompute", ["selective", "none"])
@pytest.mark.parametrize(
    ("preset", "dropout"),
    [
        *(("gpt2-tiny", 0.1), ("gpt2-tiny", 0.0), ("llama-tiny", 0.0), ("gpt-j-tiny", 0.1)),
        *(("pythia-tiny", 0.0), ("bert-tiny", 0.1)),
    ],
)
def test_what_waits_is_what_is_predicted(preset: str, dropout: float, recompute: str) -> None:
    architecture = resolve_architecture(ModelSection(preset=preset, dropout=dropout))
    plan = make_plan(
        architecture,
        batch=BatchSection(micro=3),
        plan=PlanSection(recompute=recompute),
        compute="bf16",
        sequence_length=48,
        target=load_target("zen5-2core"),
    )
    whole, weights = trace_kernel(plan, WHOLE), trace_kernel(plan, WEIGHTS)
    stream = 2 * 3 * 48 * architecture.hidden_size
    upstream = len(whole.graph.inputs) - 1
    pairs = zip(weights.contract.taken, weights.graph.inputs, strict=True)
    first = len(whole.contract.kept_inputs)
    waiting = sum(t.numel() * t.element_size() for i, t in pairs if first <= i != upstream)
    memory = MemoryModel(
        architecture=architecture, micro=3, sequence_length=48, accumulation=1, compute="bf16",
        recompute=recompute, loss_chunks=1, device="cpu",
    )  # fmt: skip
    found = memory.stage(1, embedding=False, head=False, block_passes=1, weight_passes=1)
    predicted = found.device["activations"]
    # Its input and the gradient of its output besides.
    held = 2 * stream + waiting
    # Where everything is kept, less of it is handed on than is counted.
    assert held == predicted if recompute == "selective" else held < predicted < 1.5 * held


class Storages(TorchDispatchMode):
    """Memory that operations make, and whether anything still has it, autograd's graph included."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self._given = [StorageWeakRef(tensor.untyped_storage()) for tensor in given]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                reference = StorageWeakRef(storage)
                self._made[reference.cdata] = reference, storage.nbytes()
        return results

    def alive(self) -> int:
        gc.collect()
        made = [pair for pair in self._made.values() if pair[0] not in self._given]
        return sum(size for reference, size in made if not reference.expired())


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each kernel runs."""
    calls: Counter[str] = Counter()

    def recorder(name: str) -> contextlib.AbstractContextManager[None]:
        calls[name.removeprefix("kernel/")] += 1
        return contextlib.nullcontext()

    with recording(recorder):
        yield calls


def _bytes(specs: list[dict[str, Any]]) -> int:
    sizes = {"float32": 4, "bfloat16": 2, "int64": 8}
    return sum(math.prod(spec["shape"]) * sizes[spec["dtype"]] for spec in specs)
