"""Adapters from training to a merged model: what is saved, resumed, generated and handed to PEFT."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import penstock
from penstock.checkpoint import list_checkpoints, load_checkpoint
from penstock.cli import main
from penstock.data.dataset import Dataset
from penstock.errors import CheckpointError
from penstock.training.metrics import read_metrics

LLAMA = transformers.LlamaConfig(
    vocab_size=512, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, intermediate_size=100, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with the dataset's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(LLAMA).save_pretrained(folder)
    Dataset.open(dataset_folder).tokenizer().save(folder / "tokenizer.json")
    return folder


def job(base: Path, dataset: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"from": str(base)},
        "lora": {"rank": 4, "targets": ["q_proj", "v_proj", "mlp.down"], "dropout": 0.1},
        "data": {"path": dataset, "sequence_length": 64},
        "batch": {"micro": 2, "size": 4},
        "optimizer": {"lr": 1e-2},
        "precision": {"compute": "fp32"},
        "compile": {"mode": "off"},
        "train": {"steps": 6, "report": False, "tensorboard": False},
        "checkpoint": {"every": 3},
        "run": run,
        **changes,
    }


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def trained(base: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    penstock.train(**job(base, dataset_folder, run))
    return run


def test_a_checkpoint_holds_the_adapters_and_their_state_only(trained: Path) -> None:
    tensors = load_checkpoint(list_checkpoints(trained / "checkpoints")[-1]).tensors
    assert all(".adapters." in name for name in tensors)
    adapters = [tensors[name] for name in tensors if name.startswith("master.")]
    # q, v and down in two layers: rank × (rows + columns) each, and two moments besides.
    count = 2 * 4 * ((48 + 48) + (16 + 48) + (48 + 100))
    assert sum(value.numel() for value in adapters) == count
    assert sum(value.numel() for value in tensors.values()) == 3 * count
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["trained_parameters"] == count


def test_a_stopped_run_goes_on_with_the_same_bits(
    trained: Path, base: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    first = job(base, dataset_folder, tmp_path / "run")
    penstock.train(**first)
    shutil.rmtree(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    penstock.train(**first)
    assert losses(tmp_path / "run") == losses(trained)
    one, two = (
        load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).tensors
        for run in (trained, tmp_path / "run")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("compute", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_kernels_train_what_the_eager_model_trains(
    compute: str, base: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    precision = {"precision": {"compute": compute}}
    runs = tmp_path / "eager", tmp_path / "kernels"
    penstock.train(**job(base, dataset_folder, runs[0], **precision))
    # The regions' graphs as they are lowered, run operator by operator.
    graphs = {"compile": {"toolchain": "eager"}}
    penstock.train(**job(base, dataset_folder, runs[1], **graphs, **precision))
    tolerance = 1e-5 if compute == "fp32" else 5e-3
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=tolerance)
    evaluations = [
        penstock.evaluate(run=run, data={"path": dataset_folder}).json()["loss"] for run in runs
    ]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=tolerance)


def test_peft_and_transformers_take_what_was_trained(
    trained: Path, base: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    penstock.convert("adapter", run=trained, out=tmp_path / "adapter")
    penstock.convert("checkpoint", run=trained, out=tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = Dataset.open(dataset_folder).tokenizer()
    prompt = "def read("
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (merged(ids).logits - expected).abs().max() < 1e-4
        with theirs.disable_adapter():
            assert (theirs(ids).logits - expected).abs().max() > 1e-3
        text = theirs.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    settings = {"prompt": prompt, "tokens": 12, "temperature": 0}
    adapter = {"model": {"from": str(base)}, "lora": {"from": str(tmp_path / "adapter")}}
    for source in ({"run": trained}, {"model": {"from": str(tmp_path / "merged")}}, adapter):
        made = penstock.generate(**source, generate=settings)
        assert made.completions[0].text == tokenizer.decode(text[0, ids.shape[1] :].tolist())
    scores = [
        penstock.evaluate(
            **source, data={"path": dataset_folder}, precision={"compute": "fp32"}
        ).json()["loss"]
        for source in ({"run": trained}, adapter)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_training_goes_on_from_an_adapter_of_peft(
    trained: Path, base: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    penstock.convert("adapter", run=trained, out=tmp_path / "adapter")
    lora = {"from": str(tmp_path / "adapter")}
    more = job(base, dataset_folder, tmp_path / "more", lora=lora)
    penstock.train(**more)
    assert losses(tmp_path / "more")[0] < losses(trained)[0] - 0.02


def test_other_weights_under_an_adapter_are_refused(
    base: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base, tmp_path / "base")
    run = tmp_path / "run"
    penstock.train(**job(tmp_path / "base", dataset_folder, run))
    torch.manual_seed(1)
    other = transformers.AutoModelForCausalLM.from_config(LLAMA)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="have changed since"):
        penstock.generate(run=run, generate={"prompt": "a", "tokens": 1})
    with pytest.raises(CheckpointError, match="trained with another base: "):
        penstock.train(**job(tmp_path / "base", dataset_folder, run, train={"steps": 9}))
    shutil.rmtree(tmp_path / "base")
    assert main(["generate", f"run={run}", "generate.prompt=a"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_without_adapters_has_none_to_write(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no adapters: all its weights were trained"):
        penstock.convert("adapter", run=trained_run, out=tmp_path / "adapter")
