"""What people get wrong about models, each from the command line: one line, exit code 2."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from penstock.cli import main
from penstock.data.dataset import Dataset
from penstock.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with the dataset's tokenizer, and what spoils it in folders beside it."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=24, n_head=2, n_positions=64, vocab_size=512, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    for name in ("right", "damaged", "other"):
        transformers.GPT2LMHeadModel(config).save_pretrained(place / name)
    tokenizer = Dataset.open(dataset_folder).tokenizer()
    for name in ("right", "damaged"):
        tokenizer.save(place / name / "tokenizer.json")
    Tokenizer.train(["zyx wvu tsr"] * 9, 400).save(place / "other" / "tokenizer.json")
    path = place / "damaged" / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.0.mlp.c_fc.bias"]
    tensors["transformer.ln_f.weight"] = torch.ones(7)
    tensors["transformer.extra"] = torch.ones(3)
    save_file(tensors, path, {"format": "pt"})
    (place / "dev.jsonl").write_text(json.dumps({"prompt": "a film", "completion": "good"}) + "\n")
    (place / "dev.tsv").write_text("a film\t1\n")
    (place / "empty").mkdir()
    (place / "theirs.yaml").write_text("learning_rate: 0.1\nnot_a_key_of_theirs: 3\n")
    return place


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "model.from={right}", "model.family=llama"], ["of family gpt2, not llama"]),
        (
            ["train", "model.from={damaged}"],
            [
                "transformer.h.0.mlp.c_fc.bias is missing",
                "transformer.extra has no place in the model",
                "transformer.ln_f.weight has shape [7], the model [24]",
            ],
        ),
        (["train", "model.from={other}"], ["made with another tokenizer than", "data.path"]),
        (
            ["train", "model.from={right}", "lora.rank=2", "lora.targets=[c_atn]"],
            ["no block has a linear layer c_atn", "use c_attn"],
        ),
        (
            ["evaluate", "model.from={right}", "tasks=[sst2]", "task_data={dev.tsv}",
             "evaluate.template={{text}} : ", "evaluate.labels=[bad,fine]"],
            ["tokenises ambiguously"],
        ),
        (
            ["evaluate", "model.from={right}", "tasks=[harness:lambada_openai]",
             "task_data={empty}"],
            ["has no local data"],
        ),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line_and_exit_code_2(
    words: list[str],
    told: list[str],
    folder: Path,
    dataset_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {path.name: str(path) for path in folder.iterdir()}
    given = [word.replace("{{", "<").replace("}}", ">") for word in words]
    for name, place in places.items():
        given = [word.replace(f"{{{name}}}", place) for word in given]
    given = [word.replace("<", "{").replace(">", "}") for word in given]
    if given[0] == "train":
        given += [f"data.path={dataset_folder}", f"run={tmp_path / 'run'}", "train.steps=1"]
        given += ["compile.mode=off", "data.sequence_length=64", "batch.micro=1"]
    assert main(given) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("penstock:")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for part in told:
        assert part in lines[0]


def test_an_unknown_key_of_another_system_gets_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import-config", str(folder / "theirs.yaml"), "--from", "habana"]
    assert main([*words, f"out={tmp_path / 'ours.yaml'}"]) == 0
    told = capsys.readouterr()
    named = [x for x in (told.err + told.out).splitlines() if "not_a_key_of_theirs" in x]
    assert len(named) == 1
