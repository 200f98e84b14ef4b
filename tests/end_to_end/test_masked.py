"""Masked language models from text to scores: prepared, trained by kernels and eagerly, exported."""

import os
from pathlib import Path

import pytest
import transformers

import penstock
from penstock.errors import ConfigError, DataError

TEXT = Path(os.environ.get("PENSTOCK_TEST_DATA", "../shared/data")) / "tinyshakespeare"
TINY = {"preset": "roberta-tiny", "layers": 2, "hidden_size": 64, "heads": 4}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole sequences of real text, with RoBERTa's special tokens."""
    files = sorted(TEXT.glob("*.txt")) if TEXT.is_dir() else []
    if not files:
        pytest.skip("PENSTOCK_TEST_DATA has no tinyshakespeare")
    folder = tmp_path_factory.mktemp("masked")
    text = files[0].read_text(encoding="utf-8")[:150_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    penstock.prepare(
        source={"path": str(folder / "text.txt"), "documents": "blank_line"},
        tokenizer={"train": True, "kind": "roberta", "vocab_size": 512},
        data={"path": str(folder / "data"), "sequence_length": 64},
    )
    return folder / "data"


def job(dataset: Path, run: Path, **more: object) -> dict[str, object]:
    return {
        "model": TINY,
        "data": {"path": str(dataset)},
        "run": str(run),
        "batch": {"micro": 8},
        "precision": {"compute": "fp32"},
        "optimizer": {"lr": 3e-3},
        "train": {"steps": 60, "tensorboard": False, "report": False},
        **more,
    }


def test_a_small_roberta_learns_and_kernels_equal_eager(dataset: Path, tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    for mode in ("auto", "off"):
        run = tmp_path / mode
        penstock.train(**job(dataset, run, compile={"mode": mode}))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        found = [value for value in map(penstock_json, lines) if "loss" in value]
        losses[mode] = [value["loss"] for value in found]
    # From knowing nothing, ln 512 = 6.24, to the frequencies of tokens.
    assert losses["auto"][0] > 6.0
    assert sum(losses["auto"][-5:]) / 5 < 5.5
    for ours, theirs in zip(losses["auto"], losses["off"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    given = {"data": {"path": str(dataset)}, "evaluate": {"split": "validation"}}
    first, again, eager = (
        penstock.evaluate(run=str(tmp_path / mode), **given).json()["tasks"]["masked"]
        for mode in ("auto", "auto", "off")
    )
    assert first["loss"] == again["loss"]
    assert first["loss"] == pytest.approx(eager["loss"], rel=1e-3)
    assert first["tokens"] == eager["tokens"] > 50
    assert 0.02 < first["accuracy"] < 0.9
    check_exported(tmp_path)


def penstock_json(line: str) -> dict[str, float]:
    import json

    return json.loads(line)


def check_exported(tmp_path: Path) -> None:
    """The folder works in `transformers`, its tokenizer's mask token included."""
    penstock.convert("checkpoint", run=str(tmp_path / "off"), out=str(tmp_path / "hf"))
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.mask_token == "<mask>"
    ids = tokenizer("What is <mask>?", return_tensors="pt")["input_ids"]
    assert (ids == tokenizer.mask_token_id).sum() == 1
    assert model(ids).logits.shape == (1, ids.shape[1], 512)
    with pytest.raises(ConfigError, match="roberta is a masked language model: it generates no"):
        penstock.generate(run=str(tmp_path / "off"), generate={"prompt": "To be"})


def test_each_line_a_sequence_is_padded_and_padding_is_not_seen(tmp_path: Path) -> None:
    lines = [f"line {i} of the text, number {i * i}" for i in range(300)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    data = str(tmp_path / "data")
    penstock.prepare(
        source={"path": str(tmp_path / "text.txt"), "documents": "line"},
        tokenizer={"train": True, "kind": "bert", "vocab_size": 260},
        data={"path": data, "sequence_length": 32, "packing": "single::truncate_right"},
    )
    from penstock.data.dataset import Dataset

    opened = Dataset.open(data)
    tokenizer, split = opened.tokenizer(), opened.split("train")
    for index in range(5):
        tokens, _, _ = split.sample(index, 32)
        length = split.length(index, 32)
        assert tokens[0] == tokenizer.masked.begin
        assert tokens[length - 1] == tokenizer.end_of_text
    run = tmp_path / "run"
    config = job(Path(data), run, model={"preset": "bert-tiny"}, compile={"mode": "off"})
    config["train"] = {"steps": 3, "objective": "masked", "tensorboard": False, "report": False}
    penstock.train(**config)
    assert (run / "summary.json").is_file()


def test_objectives_that_do_not_fit_are_one_line(dataset: Path, tmp_path: Path) -> None:
    wrong = job(dataset, tmp_path / "a")
    wrong["train"] = {"steps": 1, "objective": "causal"}
    with pytest.raises(ConfigError, match="roberta is a masked language model: it does not train"):
        penstock.train(**wrong)
    wrong = job(dataset, tmp_path / "b", model={"preset": "gpt2-tiny"})
    wrong["train"] = {"steps": 1, "objective": "masked"}
    with pytest.raises(ConfigError, match="gpt2 is a causal language model: it does not train"):
        penstock.train(**wrong)
    with pytest.raises(ConfigError, match="generates no text"):
        penstock.plan(model=TINY, mode="generate")


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words and others to learn from\n" * 400)
    data = str(tmp_path / "data")
    penstock.prepare(
        source={"path": str(tmp_path / "text.txt"), "documents": "line"},
        tokenizer={"train": True, "vocab_size": 300},
        data={"path": data, "sequence_length": 32, "splits": (1.0, 0.0, 0.0)},
    )
    with pytest.raises(DataError, match="has no mask token"):
        penstock.train(**job(Path(data), tmp_path / "run"))
