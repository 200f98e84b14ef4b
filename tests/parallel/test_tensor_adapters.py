"""Adapters beside blocks that are divided among processes train what one process does."""

from pathlib import Path

import pytest
import safetensors.torch

import penstock
from penstock.checkpoint import list_checkpoints
from tests.parallel.test_replicas import STEPS, assert_close, figures, run_jobs, state
from tests.parallel.test_stages_composed import assert_same_tensors, figures_of
from tests.parallel.test_tensor import divided, whole

LORA = {"lora": {"rank": 4, "targets": ["all-linear"], "dropout": 0.1}}
SOME = {"lora": {"rank": 4, "targets": ["k_proj", "mlp.down"], "dropout": 0.1}}
# The regions' graphs as they are lowered, run operator by operator.
GRAPHS = {"compile": {"toolchain": "eager"}}


def test_adapters_of_divided_blocks_train_what_one_process_trains(
    dataset_folder: Path, tmp_path: Path
) -> None:
    jobs = []
    for model, more in (("gpt2", LORA), ("llama", {**LORA, "plan": {"recompute": "blocks"}})):
        penstock.train(**whole(dataset_folder, tmp_path / f"{model}-alone", model, **more))
        jobs.append(divided(dataset_folder, tmp_path / model, model, **more))
    # Handed on to two processes from one, then to one from two.
    handed_on = tmp_path / "handed-on"
    penstock.train(**whole(dataset_folder, handed_on, train={"steps": STEPS // 3}, **LORA))
    jobs.append(divided(dataset_folder, handed_on, train={"steps": 2 * STEPS // 3}, **LORA))
    run_jobs(jobs, tmp_path)
    penstock.train(**whole(dataset_folder, handed_on, **LORA))
    last = [figures(run)[-3:] for run in (handed_on, tmp_path / "gpt2-alone")]
    assert last[0] == pytest.approx(last[1], rel=1e-5)
    for model in ("gpt2", "llama"):
        assert_close(tmp_path / model, tmp_path / f"{model}-alone")
        assert_same_tensors(state(tmp_path / model), state(tmp_path / f"{model}-alone"))
    assert all(".adapters." in name for name in state(tmp_path / "llama"))
    assert_parts_are_of_the_sizes_they_should_have(tmp_path / "llama")
    exported = []
    for run in ("llama", "llama-alone"):
        penstock.convert("adapter", run=tmp_path / run, out=tmp_path / f"{run}-exported")
        file = tmp_path / f"{run}-exported" / "adapter_model.safetensors"
        exported.append(safetensors.torch.load_file(file))
    assert_same_tensors(*exported)
    assert exported[0]["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].any()


def assert_parts_are_of_the_sizes_they_should_have(run: Path) -> None:
    """What is cut is in both files, a half in each, what is whole in the first."""
    folder = list_checkpoints(run / "checkpoints")[-1]
    first, second = (
        safetensors.torch.load_file(folder / f"model-0000{part}-of-00002.safetensors")
        for part in (1, 2)
    )
    query, down = "attention.query_key_value.adapters.k_proj", "mlp.down.adapters.down_proj"
    assert first[f"blocks.0.{query}.up"].shape == second[f"blocks.0.{query}.up"].shape == (16, 4)
    assert first[f"blocks.0.{down}.down"].shape == second[f"blocks.0.{down}.down"].shape
    whole_ones = {f"blocks.0.{query}.down", f"blocks.0.{down}.up"}
    assert whole_ones <= first.keys()
    assert not whole_ones & second.keys()


@pytest.mark.slow
def test_adapters_of_parts_go_with_kernels(dataset_folder: Path, tmp_path: Path) -> None:
    cases = {
        "compiled": ("gpt2", {**LORA, "compile": {"toolchain": "inductor"}}),
        "graphs": ("llama", {**SOME, **GRAPHS, "plan": {"recompute": "every-2"}}),
    }
    jobs = []
    for name, (model, more) in cases.items():
        penstock.train(**whole(dataset_folder, tmp_path / f"{name}-alone", model, **more))
        jobs.append(divided(dataset_folder, tmp_path / name, model, **more))
    run_jobs(jobs, tmp_path)
    for name in cases:
        assert_close(tmp_path / name, tmp_path / f"{name}-alone")
        assert_same_tensors(state(tmp_path / name), state(tmp_path / f"{name}-alone"))


@pytest.mark.slow
def test_adapters_of_parts_stand_on_bases_in_few_bits_and_in_bf16(
    dataset_folder: Path, tmp_path: Path
) -> None:
    # Parts of 128 and 256 columns of each row.
    wide = {"preset": "llama-tiny", "hidden_size": 256, "mlp_size": 512, "layers": 2}
    lora = LORA["lora"]
    cases = {
        "int8": {"lora": {**lora, "base": "int8"}, "model": wide},
        "nf4": {"lora": {**lora, "base": "nf4"}, "model": wide, **GRAPHS},
        "rounded": {**LORA, "precision": {"compute": "bf16"}},
    }
    jobs = []
    for name, more in cases.items():
        penstock.train(**{**whole(dataset_folder, tmp_path / f"{name}-alone"), **more})
        jobs.append({**divided(dataset_folder, tmp_path / name), **more})
    run_jobs(jobs, tmp_path)
    for name in ("int8", "nf4"):
        assert_close(tmp_path / name, tmp_path / f"{name}-alone")
        assert_same_tensors(state(tmp_path / name), state(tmp_path / f"{name}-alone"))
    found, expected = (figures_of(tmp_path / name) for name in ("rounded", "rounded-alone"))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_adapters_of_parts_go_with_replicas_and_stages(
    dataset_folder: Path, tmp_path: Path
) -> None:
    ways: dict[str, dict] = {
        "replicas": {"replicas": 2},
        "stages": {"stages": 2},
        "weights": {"replicas": 2, "shard": "weights"},
        "graphs": {"replicas": 2, "shard": "optimizer", "recompute": "every-2"},
    }
    penstock.train(**whole(dataset_folder, tmp_path / "alone", **LORA))
    jobs = []
    for way, plan in ways.items():
        more = GRAPHS if way == "graphs" else {}
        jobs.append(divided(dataset_folder, tmp_path / way, plan=plan, **LORA, **more))
    run_jobs(jobs, tmp_path, processes=4)
    for way in ways:
        assert_close(tmp_path / way, tmp_path / "alone")
        assert_same_tensors(state(tmp_path / way), state(tmp_path / "alone"))
