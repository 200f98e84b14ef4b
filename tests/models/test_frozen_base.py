"""Matrices held in few bits under adapters: against bitsandbytes, dense products and plain runs."""

import dataclasses
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
import transformers

import penstock
from penstock.checkpoint import list_checkpoints, load_checkpoint
from penstock.cli import main
from penstock.compiler.executable import Executable
from penstock.compiler.runtime import attach
from penstock.config.lora import LoraSection
from penstock.data.dataset import Dataset
from penstock.models.adapter import HELD_BYTES
from penstock.models.architecture import Architecture
from penstock.models.cut import Cut
from penstock.models.frozen_base import HeldLinear, hold, make_whole, pack_nf4, unpack_nf4
from penstock.models.huggingface import load_model
from penstock.models.initialization import initialize
from penstock.models.lora import adapted
from penstock.models.projection import is_trained
from penstock.models.resolve import read_hf_config
from penstock.models.transformer import Transformer
from penstock.training.metrics import read_metrics
from tests.numerics import assert_matches

LLAMA = transformers.LlamaConfig(
    vocab_size=512, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, intermediate_size=100, max_position_embeddings=64,
)  # fmt: skip
KINDS = ["int8", "nf4"]


def test_four_bits_are_those_of_bitsandbytes() -> None:
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(0))
    weight[0, 3] = 9.0
    weight[1, :64] = 0
    packed, scale = pack_nf4(weight)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 2 == weight.numel()
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected = bitsandbytes.functional.dequantize_4bit(theirs, state)
    assert (unpack_nf4(packed, scale, 24, 192) - expected).abs().max() < 1e-6
    odd = torch.randn(3, 7)
    assert unpack_nf4(*pack_nf4(odd), 3, 7).shape == (3, 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [Cut(0, (48, 16, 16)), Cut(1, (256,))])
def test_a_part_holds_the_bits_that_the_whole_has_of_it(kind: str, cut: Cut) -> None:
    weight = torch.randn(80, 256, generator=torch.Generator().manual_seed(2))
    whole = HeldLinear(256, 80)
    whole.kind = kind
    whole.fill(weight)
    parts: list[torch.Tensor] = []
    for part in range(2):
        shape = [80, 256]
        shape[cut.dimension] //= 2
        own = HeldLinear(shape[1], shape[0])
        own.kind = kind
        own.take_part(whole, cut, part, 2)
        assert own.codes.ndim == whole.codes.ndim
        assert own.codes.numel() * 2 == whole.codes.numel()
        assert own.scales.numel() * 2 == whole.scales.numel()
        assert torch.equal(own.whole(), cut.own(whole.whole(), part, 2))
        parts.append(own.whole())
    assert torch.equal(cut.joined(parts), whole.whole())


def architecture(kind: str | None) -> Architecture:
    plain = Architecture(
        family="gpt2", layers=2, hidden_size=48, heads=3, mlp_size=192, max_positions=40,
        vocab_size=97,
    )  # fmt: skip
    return adapted(plain, LoraSection(rank=3, targets=["all-linear"], base=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_rounded_weights_compute(kind: str) -> None:
    held, whole = (Transformer(architecture(kind)) for _ in range(2))
    for model in (held, whole):
        initialize(model, 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".up"):
                    parameter.fill_(0.1)
        hold(model, kind)
    make_whole(whole, torch.float32)
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    sizes: list[int] = []

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    for model in (held, whole):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(model.architecture, name))
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        loss = held(tokens[:, :-1], tokens[:, 1:])
    assert 48 * 192 not in sizes  # no unpacked matrix waits for the backward pass
    loss.backward()
    expected = whole(tokens[:, :-1], tokens[:, 1:])
    expected.backward()
    assert torch.equal(loss, expected)
    trained = [name for name, parameter in held.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 4
    for name in trained:
        assert torch.allclose(
            held.get_parameter(name).grad, whole.get_parameter(name).grad, rtol=1e-5, atol=1e-7
        )
    bytes_held = sum(b.numel() * b.element_size() for b in held.blocks.buffers())
    matrices = 2 * held.architecture.block_matrix_elements()
    assert bytes_held == pytest.approx(
        HELD_BYTES[kind] * matrices, rel=0.3 if kind == "int8" else 0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_packed_as_they_are_read(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    reference = transformers.AutoModelForCausalLM.from_config(LLAMA)
    reference.save_pretrained(tmp_path)
    family, fields = read_hf_config(tmp_path)
    wanted = adapted(Architecture(family=family, **fields), LoraSection(rank=2, base=kind))
    read = load_model(tmp_path, wanted, "cpu", torch.float32)
    later = load_model(tmp_path, adapted(Architecture(family=family, **fields), LoraSection(rank=2)),
                       "cpu", torch.float32)  # fmt: skip
    hold(later, kind)
    ours, theirs = dict(read.named_buffers()), dict(later.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def base(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(LLAMA).save_pretrained(folder)
    Dataset.open(dataset_folder).tokenizer().save(folder / "tokenizer.json")
    return folder


def job(base: Path, dataset: Path, run: Path, kind: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"from": str(base)},
        "lora": {"rank": 4, "targets": ["all-linear"], "base": kind},
        "data": {"path": dataset, "sequence_length": 64},
        "batch": {"micro": 2, "size": 4},
        "optimizer": {"lr": 1e-2},
        "compile": {"mode": "off"},
        "train": {"steps": 8, "report": False, "tensorboard": False},
        "run": run,
        **changes,
    }


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(("kind", "compute"), [("int8", "fp32"), ("nf4", "bf16")])
def test_a_run_trains_evaluates_and_is_merged(
    kind: str, compute: str, base: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    precision = {"precision": {"compute": compute}}
    runs = {name: tmp_path / str(name) for name in (kind, None)}
    for name, run in runs.items():
        penstock.train(**job(base, dataset_folder, run, name, **precision))
    found, plain = losses(runs[kind]), losses(runs[None])
    assert found[-1] < found[0] - 0.001
    assert found == pytest.approx(plain, rel=0.02)
    assert found != plain
    tensors = load_checkpoint(list_checkpoints(runs[kind] / "checkpoints")[-1]).tensors
    assert all(".adapters." in name for name in tensors)
    scored = penstock.evaluate(run=runs[kind], data={"path": dataset_folder}).json()["loss"]
    penstock.convert("checkpoint", run=runs[kind], out=tmp_path / "merged")
    merged = penstock.evaluate(
        model={"from": str(tmp_path / "merged")}, data={"path": dataset_folder}
    ).json()["loss"]
    assert merged == pytest.approx(scored, rel=1e-5 if compute == "fp32" else 5e-3)
    penstock.convert("adapter", run=runs[kind], out=tmp_path / "adapter")
    outside = penstock.evaluate(
        model={"from": str(base)},
        lora={"from": str(tmp_path / "adapter"), "base": kind},
        data={"path": dataset_folder},
        precision={"compute": compute},
    ).json()["loss"]
    assert outside == pytest.approx(scored, rel=1e-5 if compute == "fp32" else 5e-3)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An executable of plain adapters, for 2 × 20 tokens in float32."""
    path = tmp_path_factory.mktemp("executable") / "adapters.penstock"
    penstock.compile(
        model={"from": str(base)}, lora={"rank": 4, "targets": ["all-linear"]},
        batch={"micro": 2}, data={"sequence_length": 20}, precision={"compute": "fp32"},
        compile={"toolchain": "eager"}, executable=path,
    )  # fmt: skip
    return path


def test_a_run_with_kernels_computes_what_one_without_does(
    base: Path, dataset_folder: Path, adapters: Path, tmp_path: Path
) -> None:
    """The kernels of plain adapters serve: one executable, however matrices are held."""
    found: list[list[float]] = []
    for index, settings in enumerate([{}, {"executable": adapters, "compile": {}}]):
        given = job(base, dataset_folder, tmp_path / str(index), "nf4", **settings)
        given["data"]["sequence_length"], given["train"]["steps"] = 20, 3
        summary = penstock.train(**given, precision={"compute": "fp32"})
        assert summary.values["compiled"] == bool(index)
        found.append(losses(tmp_path / str(index)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["selective", "blocks"])
def test_kernels_keep_no_unpacked_matrix(
    kind: str, recompute: str, base: Path, adapters: Path
) -> None:
    executable = Executable.open(adapters)
    own = executable.plan.architecture
    held = dataclasses.replace(own, adapter=dataclasses.replace(own.adapter, base=kind))
    model, whole = (load_model(base, held, "cpu", torch.float32) for _ in range(2))
    make_whole(whole, torch.float32)
    attach(model, executable.kernels(), recompute=recompute)
    tokens = torch.randint(0, 512, (2, 21), generator=torch.Generator().manual_seed(1))
    arguments = tokens[:, :-1], tokens[:, 1:], torch.full((2, 20), 1 / 40)
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    for one in (model, whole):
        generator = torch.Generator().manual_seed(2)
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(is_trained(one.architecture, name))
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.1, generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(*arguments)
    matrices = {(48, 48), (80, 48), (100, 48), (48, 100)}
    assert not {tuple(t.shape) for t in kept if t.is_floating_point()} & matrices
    loss.backward()
    expected = whole(*arguments)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7
    for name in trained:
        assert_matches(model.get_parameter(name).grad, whole.get_parameter(name).grad, 1e-4)


def test_the_plan_counts_it_and_mistakes_are_told(
    base: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {}
    for kind in (None, *KINDS):
        values = job(base, dataset_folder, tmp_path / "run", kind)
        values["model"] = {"preset": "llama-2-7b"}
        values["data"] = {"sequence_length": 512}
        weights[kind] = penstock.plan(**values).json()["memory"]["weights"]
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    for kind in KINDS:
        saved = (2 - HELD_BYTES[kind]) * matrices
        assert weights[None] - weights[kind] == pytest.approx(saved, rel=1e-6)
    # Kernels take a whole block unpacked, other code a matrix at a time: what is more is the rest.
    spaces = []
    for mode in ("auto", "off"):
        values = {**values, "lora": {**values["lora"], "base": "nf4"}, "compile": {"mode": mode}}
        held = penstock.plan(**values).json()["memory"]["workspace"]
        values["lora"]["base"] = None
        spaces.append(held - penstock.plan(**values).json()["memory"]["workspace"])
    largest = 3 * 4096 * 4096  # queries, keys and values in one
    # Of what comes and goes the heap is cut up by 15%.
    assert spaces[0] == pytest.approx(1.15 * (2 * 4 * largest + 2 * matrices // 32), abs=2)
    assert spaces[1] == pytest.approx(1.15 * (2 * 4 * largest + 2 * largest), abs=2)
    words = [f"run={tmp_path / 'r'}", f"data.path={dataset_folder}", "train.steps=1"]
    for wrong, told in (
        (["model.preset=llama-tiny", "lora.base=int8"], "lora.base is set, but there are no"),
        ([f"model.from={base}", "lora.base=int4", "lora.rank=2"], "lora.base"),
    ):
        assert main(["train", *words, *wrong]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert told in error[0]
