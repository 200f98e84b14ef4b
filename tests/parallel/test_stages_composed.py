"""Adapters, frozen parameters, decayed rates and lengths of their own train alike in stages."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

import penstock
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import STEPS, assert_close, job, run_jobs, state
from tests.parallel.test_stages_trained import MODEL, staged

LORA = {"lora": {"rank": 4, "targets": ["all-linear"], "dropout": 0.1}}
# The first of two stages has nothing left to train.
FROZEN = {"train": {"steps": STEPS, "freeze": ["embed.*", "blocks.[01].*"]}}
DECAYED = {"optimizer": {"lr": 3e-3, "layer_decay": 0.7}}


def test_what_is_composed_with_stages_trains_as_in_one_process(
    dataset_folder: Path, lines: Path, tmp_path: Path
) -> None:
    grouped = {"data": {"path": str(lines), "sequence_length": 48, "group_by_length": True}}
    cases = {
        "lora": ("1f1b", LORA),
        "frozen": ("interleaved", FROZEN),
        "frozen-apart": ("zero-bubble", FROZEN),
        "decayed": ("zero-bubble", DECAYED),
        "grouped": ("gpipe", grouped),
        "recomputed": ("1f1b", {"plan": {"recompute": "blocks"}}),
    }
    jobs = []
    for name, (schedule, more) in cases.items():
        penstock.train(
            **{**job(dataset_folder, tmp_path / f"{name}-alone", **more), "model": MODEL}
        )
        jobs.append(staged(dataset_folder, tmp_path / name, schedule, **more))
    run_jobs(jobs, tmp_path)
    for name in cases:
        assert_close(tmp_path / name, tmp_path / f"{name}-alone")
        assert_same_tensors(state(tmp_path / name), state(tmp_path / f"{name}-alone"))
    assert all(".adapters." in name for name in state(tmp_path / "lora"))
    assert {name.split(".")[2] for name in state(tmp_path / "frozen") if "blocks" in name} == {
        "2",
        "3",
    }
    exported = []
    for run in ("lora", "lora-alone"):
        penstock.convert("adapter", run=tmp_path / run, out=tmp_path / f"{run}-exported")
        file = tmp_path / f"{run}-exported" / "adapter_model.safetensors"
        exported.append(safetensors.torch.load_file(file))
    assert len(exported[0]) == 4 * 4 * 2  # layers, matrices of each, A and B
    assert_same_tensors(*exported)


@pytest.mark.slow
def test_divided_stages_train_adapters_and_what_is_not_frozen(
    dataset_folder: Path, tmp_path: Path
) -> None:
    # Also what a step computes in bf16: gradients of micro-batches are summed in float32.
    rounded = {"precision": {"compute": "bf16"}}
    cases = {
        "lora": ("weights", "1f1b", LORA),
        "frozen": ("gradients", "gpipe", FROZEN),
        "rounded": ("weights", "gpipe", rounded),
    }
    jobs = []
    for name, (shard, schedule, more) in cases.items():
        alone = job(dataset_folder, tmp_path / f"{name}-alone", **more)
        penstock.train(**{**alone, "model": MODEL})
        plan = {"plan": {"replicas": 2, "shard": shard}}
        jobs.append(staged(dataset_folder, tmp_path / name, schedule, **plan, **more))
    run_jobs(jobs, tmp_path, processes=4)
    for name in ("lora", "frozen"):
        assert_close(tmp_path / name, tmp_path / f"{name}-alone")
        assert_same_tensors(state(tmp_path / name), state(tmp_path / f"{name}-alone"))
    found, expected = (figures_of(tmp_path / name) for name in ("rounded", "rounded-alone"))
    assert found == pytest.approx(expected, rel=1e-3)


def figures_of(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() != set()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=1e-3, atol=1e-5), key


@pytest.mark.slow
def test_all_of_it_at_once(dataset_folder: Path, tmp_path: Path) -> None:
    # The regions' graphs as they are lowered, run operator by operator.
    kernels = {"compile": {"toolchain": "eager"}}
    held = {"lora": {"rank": 4, "base": "nf4", "targets": ["all-linear"]}}
    again = {"plan": {"recompute": "every-2"}}
    cases = {
        "held": {**held, **again},
        "adapters": {**LORA, **kernels, **again},
        "frozen": {**FROZEN, **kernels, **DECAYED},
    }
    alone = {name: job(dataset_folder, tmp_path / f"{name}-alone", **cases[name]) for name in cases}
    for values in alone.values():
        penstock.train(**{**values, "model": MODEL})
    two = [staged(dataset_folder, tmp_path / name, "1f1b", **cases[name]) for name in cases]
    run_jobs(two, tmp_path)
    four = []
    for name, shard in (("adapters", "weights"), ("frozen", "optimizer")):
        plan = {**cases[name].get("plan", {}), "replicas": 2, "shard": shard}
        more = {**cases[name], "plan": plan}
        four.append(staged(dataset_folder, tmp_path / f"{name}-divided", "1f1b", **more))
    run_jobs(four, tmp_path, processes=4)
    for name in (*cases, "adapters-divided", "frozen-divided"):
        expected = tmp_path / f"{name.removesuffix('-divided')}-alone"
        assert_close(tmp_path / name, expected)
        assert_same_tensors(state(tmp_path / name), state(expected))
