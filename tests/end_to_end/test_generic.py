"""Models of `transformers` that are of none of our families: trained, scored and written back."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import penstock
from penstock.config.schema import ModelSection
from penstock.errors import CheckpointError, UserError
from penstock.models.generic import GenericModel
from penstock.models.resolve import read_hf_config, resolve_architecture

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def opt(**changes: object) -> transformers.PretrainedConfig:
    given = {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    return transformers.OPTConfig(**{**SMALL, **given, "dropout": 0.0, **changes})


def electra() -> transformers.PretrainedConfig:
    given = {"intermediate_size": 64, "embedding_size": 32, "max_position_embeddings": 64}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.ElectraConfig(**SMALL, **given, **none)


def mamba() -> transformers.PretrainedConfig:
    return transformers.MambaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4
    )


def saved(config: transformers.PretrainedConfig, folder: Path, *, masked: bool = False) -> Path:
    torch.manual_seed(3)
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset by each kind of tokenizer."""
    folder = tmp_path_factory.mktemp("generic")
    words = " ".join(f"word{i % 7} and number {i % 13}." for i in range(300))
    (folder / "text.txt").write_text(words)
    for kind in ("gpt2", "roberta"):
        penstock.prepare(
            source={"path": str(folder / "text.txt")},
            tokenizer={"train": True, "kind": kind, "vocab_size": 300},
            data={"path": str(folder / kind), "sequence_length": 32, "splits": [0.8, 0.1, 0.1]},
        )
    return {kind: folder / kind for kind in ("gpt2", "roberta")}


def job(model: Path, dataset: Path, run: Path, **train: object) -> dict[str, object]:
    return {
        "model": {"from": str(model)},
        "data": {"path": str(dataset), "sequence_length": 32},
        "batch": {"micro": 4},
        "precision": {"compute": "fp32"},
        "optimizer": {"lr": 1e-2},
        "run": str(run),
        "train": {"steps": 12, "tensorboard": False, "report": False, **train},
    }


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("config", [opt(), mamba()], ids=["opt", "mamba"])
def test_another_causal_model_trains_and_is_written_back(
    config: transformers.PretrainedConfig,
    data: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = saved(config, tmp_path / "model")
    run = tmp_path / "run"
    penstock.train(**job(folder, data["gpt2"], run))
    said = capsys.readouterr()
    name = config.model_type
    assert (
        f"{name} is not one of Penstock's families: it runs as transformers" in said.err + said.out
    )
    found = losses(run)
    assert found[-1] < found[0] - 0.3
    scores = penstock.evaluate(
        run=str(run), data={"path": str(data["gpt2"])}, evaluate={"split": "train"}
    ).json()
    assert scores["loss"] < found[0]
    penstock.convert("checkpoint", run=str(run), out=str(tmp_path / "hf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    again = penstock.evaluate(
        model={"from": str(tmp_path / "hf")},
        data={"path": str(data["gpt2"]), "sequence_length": 32},
        evaluate={"split": "train"},
    ).json()
    assert again["loss"] == pytest.approx(scores["loss"], rel=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "<|endoftext|>"
    assert type(model).__name__.lower().startswith(name)
    with pytest.raises(UserError, match="it generates no text here"):
        penstock.generate(run=str(run), generate={"prompt": "word1"})


def test_another_masked_model_trains_and_is_scored(data: dict[str, Path], tmp_path: Path) -> None:
    folder = saved(electra(), tmp_path / "model", masked=True)
    run = tmp_path / "run"
    config = job(folder, data["roberta"], run)
    penstock.train(**config)
    found = losses(run)
    assert found[-1] < found[0]
    scores = penstock.evaluate(
        run=str(run), data={"path": str(data["roberta"])}, evaluate={"split": "train"}
    ).json()["tasks"]["masked"]
    assert scores["tokens"] > 50
    assert scores["loss"] < found[0]


def test_the_first_loss_is_that_of_transformers(tmp_path: Path) -> None:
    folder = saved(opt(), tmp_path)
    architecture = resolve_architecture(ModelSection.model_validate({"from": str(folder)}))
    model = GenericModel.load(folder, architecture, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert architecture.parameter_count() == theirs.num_parameters()
    tokens = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens, labels=tokens).loss
    weights = torch.full((3, 19), 1 / 57)
    ours = model(tokens[:, :-1], tokens[:, 1:], weights)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_dropout_is_a_function_of_the_step(tmp_path: Path) -> None:
    folder = saved(opt(dropout=0.3), tmp_path)
    architecture = resolve_architecture(ModelSection.model_validate({"from": str(folder)}))
    assert architecture.dropout == pytest.approx(0.3)
    model = GenericModel.load(folder, architecture, torch.float32)
    tokens = torch.arange(40).view(2, 20)
    before = torch.random.get_rng_state()
    first, again, other = (
        model(tokens, tokens, keys=model.dropout_keys(0, step, torch.arange(2)))
        for step in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(model(tokens), model(tokens))
    section = ModelSection.model_validate({"from": str(folder), "dropout": 0.0})
    assert resolve_architecture(section).dropout == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"layers": 3}}, "model.layers cannot change opt"),
        ({"data": {"attention": "document"}}, "data.attention is for Penstock's own families"),
        ({"plan": {"recompute": "blocks"}}, "plan.recompute is for Penstock's own families"),
        ({"lora": {"rank": 4}}, "opt is not one of Penstock's families: it takes no adapters"),
    ],
)
def test_what_another_model_has_no_part_in_is_one_line(
    changes: dict[str, dict[str, object]], message: str, tmp_path: Path
) -> None:
    folder = saved(opt(), tmp_path)
    given = {"model": {"from": str(folder)}, "data": {"sequence_length": 32}, "lora": {}}
    merged = {k: {**given.get(k, {}), **changes.get(k, {})} for k in (*given, "plan")}
    with pytest.raises(UserError) as caught:
        penstock.plan(**merged)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_code_of_the_folder_runs_and_no_other_kind_of_model_is_taken(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}}
    for value in (config, {"model_type": "vit"}):
        (tmp_path / "config.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match="does not describe a model Penstock knows"):
            penstock.plan(model={"from": str(tmp_path)})


def test_without_transformers_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(opt(), tmp_path)
    monkeypatch.delitem(sys.modules, "penstock.models.generic", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="of none of our families, and transformers is not"):
        read_hf_config(folder)
