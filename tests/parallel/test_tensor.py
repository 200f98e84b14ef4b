"""Blocks divided among processes train what one process does."""

from pathlib import Path

import pytest
import safetensors
import torch

import penstock
from penstock.checkpoint import best_checkpoint, list_checkpoints, load_checkpoint
from penstock.config.load import as_config
from penstock.config.lora import LoraSection
from penstock.config.schema import ModelSection
from penstock.errors import ConfigError
from penstock.models.architecture import Architecture
from penstock.models.initialization import initialize
from penstock.models.lora import adapted
from penstock.models.resolve import resolve_architecture
from penstock.models.rotary import rotation
from penstock.models.split_block import SplitBlock, cut_of, has_partial_gradient
from penstock.models.transformer import Block, Transformer
from penstock.parallel.environment import Place
from penstock.parallel.mesh import coordinates
from penstock.planning import plan_of
from penstock.train_demands import require_parts_here
from tests.numerics import assert_matches
from tests.parallel.test_replicas import STEPS, assert_close, figures, job, run_jobs, start, state

MODELS = {
    "gpt2": {"preset": "gpt2-tiny", "dropout": 0.1},
    "neox": {"preset": "pythia-tiny", "dropout": 0.1},
    "llama": {"preset": "llama-tiny"},
}
PRESETS = ("gpt2-tiny", "pythia-tiny", "gpt-j-tiny", "llama-tiny", "bert-tiny", "albert-tiny")


def divided(dataset: Path, run: Path, model: str = "gpt2", **more: object) -> dict:
    plan = {"tensor": 2, **more.pop("plan", {})}
    return {**job(dataset, run, **more), "model": MODELS[model], "plan": plan}


def whole(dataset: Path, run: Path, model: str = "gpt2", **more: object) -> dict:
    return {**job(dataset, run, **more), "model": MODELS[model]}


@pytest.fixture(scope="module")
def alone(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for model in MODELS:
        penstock.train(**whole(dataset_folder, folder / model, model))
    return folder


def test_divided_blocks_train_what_one_process_does(
    alone: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    jobs = [divided(dataset_folder, tmp_path / model, model) for model in MODELS]
    # Handed on to two processes from one, then to one from two.
    penstock.train(**whole(dataset_folder, tmp_path / "handed-on", train={"steps": STEPS // 3}))
    longer = {"train": {"steps": 2 * STEPS // 3}}
    jobs.append(divided(dataset_folder, tmp_path / "handed-on", **longer))
    run_jobs(jobs, tmp_path)
    penstock.train(**whole(dataset_folder, tmp_path / "handed-on"))
    # Each part of it has validated at its own end.
    last = [figures(run)[-3:] for run in (tmp_path / "handed-on", alone / "gpt2")]
    assert last[0] == pytest.approx(last[1], rel=1e-5)
    for model in MODELS:
        assert_close(tmp_path / model, alone / model)
        found, expected = state(tmp_path / model), state(alone / model)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            kept = torch.ones(len(tensor), dtype=torch.bool)
            if name.endswith("query_key_value.bias"):
                # What all keys share, but where they are turned by their positions, changes no
                # weight of attention: its gradient is rounding, which AdamW makes as large as any.
                kept[len(tensor) // 3 : 2 * len(tensor) // 3] = False
            assert torch.allclose(found[name][kept], tensor[kept], rtol=1e-3, atol=1e-5), name
        best = [best_checkpoint(run / model / "checkpoints") for run in (tmp_path, alone)]
        assert best[0] is not None
        assert best[1] is not None
        assert best[0].name == best[1].name
        losses = [load_checkpoint(path).values["totals"]["best_loss"] for path in best]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_parts_are_in_files_of_their_own_and_are_exported_whole(
    alone: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    penstock.convert("checkpoint", run=alone / "llama", out=tmp_path / "from")
    start_from = {"model": {"from": str(tmp_path / "from")}}
    short = {"train": {"steps": 4}}
    penstock.train(**{**job(dataset_folder, tmp_path / "one", **short), **start_from})
    run_jobs([{**divided(dataset_folder, tmp_path / "two", **short), **start_from}], tmp_path)
    assert figures(tmp_path / "two") == pytest.approx(figures(tmp_path / "one"), rel=1e-5)
    folder = list_checkpoints(tmp_path / "two" / "checkpoints")[-1]
    rows = []
    for part in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        with safetensors.safe_open(folder / part, "pt") as file:
            rows.append(file.get_slice("blocks.0.attention.query_key_value.weight").get_shape()[0])
            assert ("embed.tokens.weight" in file.keys()) == (part[6:11] == "00001")  # noqa: SIM118
    assert rows == [64, 64]  # of 64 rows for queries and 2 × 32 for keys and values
    for run in ("one", "two"):
        penstock.convert("checkpoint", run=tmp_path / run, out=tmp_path / f"{run}-exported")
    exported = [tensors(tmp_path / f"{run}-exported") for run in ("one", "two")]
    assert exported[0].keys() == exported[1].keys()
    for name, tensor in exported[0].items():
        assert torch.allclose(exported[1][name].float(), tensor.float(), rtol=1e-3, atol=1e-5), name


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_divided_blocks_go_with_replicas_and_with_stages(
    alone: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    ways: dict[str, dict] = {
        "replicas": {"replicas": 2},
        "stages": {"stages": 2},
        "gpipe": {"stages": 2, "schedule": "gpipe"},
        "optimizer": {"replicas": 2, "shard": "optimizer"},
        "weights": {"replicas": 2, "shard": "weights"},
    }
    jobs = [divided(dataset_folder, tmp_path / way, plan=plan) for way, plan in ways.items()]
    jobs.append(divided(dataset_folder, tmp_path / "four", plan={"tensor": 4}))
    run_jobs(jobs, tmp_path, processes=4)
    for way in (*ways, "four"):
        assert_close(tmp_path / way, alone / "gpt2")
        assert state(tmp_path / way).keys() == state(alone / "gpt2").keys()


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_shares_add_up_to_the_block(preset: str, adapters: bool) -> None:
    architecture = _preset(preset, dropout=0.2)
    if adapters:
        lora = LoraSection(rank=3, targets=["all-linear"], dropout=0.3)
        architecture = adapted(architecture, lora)
    model = Transformer(architecture)
    initialize(model, 3)
    block = model.blocks[0]
    assert isinstance(block, Block)
    for parameter in block.parameters():  # biases and norms that are not 0 and 1
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(1))
    x = torch.randn(3, 10, 64, generator=torch.manual_seed(2), requires_grad=True)
    keys = model.dropout_keys(5, 6, torch.arange(3))
    assert keys is not None
    turns = rotation(architecture, torch.arange(10)[None])
    segments = None if architecture.is_causal else torch.zeros(3, 10, dtype=torch.int64)
    upstream = torch.randn(3, 10, 64, generator=torch.manual_seed(4))
    expected = block(x, keys[1], turns, segments)
    expected.backward(upstream)
    expected_x, x.grad = x.grad, None

    parts = [SplitBlock.of(block, architecture, part, 2) for part in range(2)]
    first, given = parts[0], keys[1]
    shares = [p.attend(x, p.own_keys(given, 10), turns, segments) for p in parts]
    attended = x + first.attended(sum(shares), given)
    attended = first.attention_norm(attended) if block.normalizes_sums else attended
    read = x if block.is_parallel else attended
    found = attended + first.fed(sum(p.feed(read, p.own_keys(given, 10)) for p in parts), given)
    found = first.mlp_norm(found) if block.normalizes_sums else found
    found.backward(upstream)
    assert_matches(found, expected, 3e-6)
    assert_matches(x.grad, expected_x, 3e-6)
    for name, parameter in block.named_parameters():
        gradients = [dict(p.named_parameters())[name].grad for p in parts]
        cut = cut_of(architecture, f"blocks.0.{name}")
        if cut is not None:
            gradient = cut.joined(gradients)
        elif has_partial_gradient(architecture, f"blocks.0.{name}"):
            gradient = gradients[0] + gradients[1]
        else:
            gradient = gradients[0]
        assert_matches(gradient, parameter.grad, 3e-6)


def test_parts_stand_next_to_each_other() -> None:
    places = [coordinates(Place(rank=rank, size=8), 2, 2) for rank in range(8)]
    assert places == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"plan": {"tensor": 3}}, "model.heads=4 cannot be divided by plan.tensor=3"),
        (
            {"model": {"preset": "llama-tiny"}, "plan": {"tensor": 4}},
            "model.kv_heads=2 cannot be divided by plan.tensor=4",
        ),
        (
            {"model": {"preset": "gpt2-tiny", "mlp_size": 255}},
            "model.mlp_size=255 cannot be divided by plan.tensor=2",
        ),
        (
            {"lora": {"rank": 4, "base": "nf4"}},
            "lora.base=nf4 has a scale for every 64 weights of a row, of which plan.tensor=2 would "
            "divide some: model.hidden_size=64",
        ),
        (
            {"optimizer": {"name": "adafactor"}},
            "optimizer.name=adafactor does not go with plan.tensor=2: it needs whole matrices",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_by_its_key(given: dict, line: str) -> None:
    base = {"model": {"preset": "gpt2-tiny"}, "plan": {"tensor": 2}, "data": {"sequence_length": 8}}
    config = as_config(**{**base, **given})
    with pytest.raises(ConfigError) as raised:
        require_parts_here(config, plan_of(config, None))
    assert line in str(raised.value)


def test_processes_that_do_not_fit_are_told_once(dataset_folder: Path, tmp_path: Path) -> None:
    values = divided(dataset_folder, tmp_path / "run", plan={"replicas": 2})
    process = start(values, tmp_path, "--processes", "2")
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 2, error
    lines = [line for line in error.splitlines() if line.startswith("penstock")]
    assert lines == [
        "penstock: the plan is for 2 replicas with 2 processes for each block, the job has 2 "
        "processes (plan.tensor): start it with --processes 4, or change plan.replicas"
    ]


def _preset(name: str, **more: object) -> Architecture:
    return resolve_architecture(ModelSection.model_validate({"preset": name, **more}), 512)
