"""Training parts of a model, other optimizers, and stopping early, through the public functions."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import penstock
from penstock.checkpoint import list_checkpoints, load_checkpoint
from penstock.config.load import as_config
from penstock.errors import CheckpointError, ConfigError
from penstock.runs import load_run
from penstock.training.metrics import read_metrics

FREEZE = ["embed.*", "blocks.0.*", "blocks.1.mlp.*"]


def job(dataset: Path, run: Path, **changes: Any) -> dict[str, Any]:
    train = {"steps": 6, "report": False, "tensorboard": False, **changes.pop("train", {})}
    return {
        "model": {"preset": "gpt2-tiny"},
        "data": {"path": dataset, "sequence_length": 64},
        "batch": {"micro": 2, "size": 4},
        "optimizer": {"lr": 1e-2},
        "precision": {"compute": "fp32"},
        "compile": {"mode": "off"},
        "train": train,
        "checkpoint": {"every": 3},
        "run": run,
        **changes,
    }


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).tensors


def stopped_and_resumed(settings: dict[str, Any]) -> None:
    """Train, lose the last checkpoint, and train on from the one before."""
    penstock.train(**settings)
    shutil.rmtree(list_checkpoints(Path(settings["run"]) / "checkpoints")[-1])
    penstock.train(**settings)


@pytest.mark.parametrize("parts", ["all", "adapters"])
def test_a_run_starts_from_another_runs_weights(
    parts: str, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run with adapters, their sum with the weights they stand on."""
    first, second = tmp_path / "first", tmp_path / "second"
    lora = {"lora": {"rank": 2}} if parts == "adapters" else {}
    short: dict[str, Any] = {"train": {"steps": 2}, "checkpoint": {"every": 1}}
    penstock.train(**job(dataset_folder, first, **lora, **short))
    trained = load_run(as_config(run=str(first))).weights()
    start = {"model": {"from": str(first)}, "optimizer": {"lr": 1e-9}}
    settings = job(dataset_folder, second, **start, **short)
    penstock.train(**settings)
    assert f"the weights of {first} at step 2" in "".join(capsys.readouterr().err.splitlines())
    found = load_run(as_config(run=str(second))).weights()
    assert found.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    folder = first / "weights" / "step-00000002"
    written = folder.stat().st_mtime_ns
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) > 0
    stopped_and_resumed(settings)
    assert folder.stat().st_mtime_ns == written


def test_frozen_weights_stay_are_not_saved_and_come_back(
    dataset_folder: Path, tmp_path: Path
) -> None:
    from penstock.models.initialization import initialize
    from penstock.models.transformer import Transformer

    run = tmp_path / "run"
    stopped_and_resumed(job(dataset_folder, run, train={"freeze": FREEZE}, seed=3))
    loaded = load_run(as_config(run=str(run)))
    start = Transformer(loaded.plan.architecture)
    initialize(start, 3)
    weights, trained = loaded.weights(), loaded.trained()
    assert weights.keys() == dict(start.named_parameters()).keys()
    for name, before in start.named_parameters():
        frozen = name.startswith(("embed.", "blocks.0.", "blocks.1.mlp."))
        assert (name in trained) is not frozen
        assert torch.equal(weights[name], before) is frozen, name
    assert not any("blocks.0." in name for name in state(run))
    penstock.convert("checkpoint", run=run, out=tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = theirs.get_input_embeddings().weight.detach()
    assert torch.equal(embedding, weights["embed.tokens.weight"][: embedding.shape[0]])
    penstock.train(**job(dataset_folder, tmp_path / "whole", train={"freeze": FREEZE}, seed=3))
    assert losses(tmp_path / "whole") == losses(run)
    assert all(torch.equal(v, state(run)[n]) for n, v in state(tmp_path / "whole").items())
    with pytest.raises(CheckpointError, match="trained with another frozen: "):
        penstock.train(
            **job(dataset_folder, run, train={"steps": 9, "freeze": ["embed.*"]}, seed=3)
        )


def test_kernels_leave_frozen_weights_alone_too(dataset_folder: Path, tmp_path: Path) -> None:
    runs = tmp_path / "eager", tmp_path / "kernels"
    freeze = {"train": {"freeze": FREEZE}}
    penstock.train(**job(dataset_folder, runs[0], **freeze))
    penstock.train(**job(dataset_folder, runs[1], **freeze, compile={"toolchain": "eager"}))
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert state(runs[0]).keys() == state(runs[1]).keys()


@pytest.mark.parametrize("name", ["sgd", "adafactor", "radam"])
def test_a_run_with_an_optimizer_of_torch_resumes_with_the_same_bits(
    name: str, dataset_folder: Path, tmp_path: Path
) -> None:
    settings = {"optimizer": {"name": name, "lr": 1e-2, "layer_decay": 0.9},
                "precision": {"compute": "bf16"}}  # fmt: skip
    penstock.train(**job(dataset_folder, tmp_path / "whole", **settings))
    stopped_and_resumed(job(dataset_folder, tmp_path / "parts", **settings))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, two = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = {**settings, "optimizer": {"name": "adamw"}}
    with pytest.raises(CheckpointError, match="the optimizer state does not fit"):
        penstock.train(**job(dataset_folder, tmp_path / "whole", train={"steps": 9}, **other))


def test_a_run_stops_when_validation_no_longer_improves(
    dataset_folder: Path, tmp_path: Path
) -> None:
    train = {"steps": 50, "evaluate_every": 2, "patience": 3, "evaluate_sequences": 4}
    still = {"optimizer": {"lr": 0.0}, "checkpoint": {"every": 4}, "train": train}
    summary = penstock.train(**job(dataset_folder, tmp_path / "run", **still)).values
    # The first validation is the best; three more at the same loss are enough.
    assert summary["steps"] == 8
    assert summary["complete"]
    again = penstock.train(**job(dataset_folder, tmp_path / "run", **still)).values
    assert again["steps"] == 8
    stopped_and_resumed(job(dataset_folder, tmp_path / "parts", **still))
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl")[-1]["step"] == 8


def test_patience_without_validations_is_refused(dataset_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.patience needs validations"):
        penstock.train(**job(dataset_folder, tmp_path / "run", train={"patience": 2}))
    assert not (tmp_path / "run").exists()


def test_adapters_train_with_muon(dataset_folder: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 4}, "optimizer": {"name": "muon", "lr": 1e-2}}
    penstock.train(**job(dataset_folder, tmp_path / "run", **lora))
    kinds = {name.partition(".")[0] for name in state(tmp_path / "run")}
    assert kinds == {"master", "momentum"}
