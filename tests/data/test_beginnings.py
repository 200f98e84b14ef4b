"""The token some tokenizers begin a text with: where it comes from, and where it is put."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import penstock
from penstock.cli import main
from penstock.data.dataset import Dataset, read_documents
from penstock.data.tokenizer import Tokenizer
from penstock.errors import DataError

BEGIN, END = 0, 1
TEXTS = ("def read(path):", " a b", "")


def byte_pairs(*special: str) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with these special tokens first."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(["def read(path): return path"], trainer)
    return inner


def write(folder: Path, *, puts: bool, adds: bool | None) -> Path:
    """A tokenizer like Llama's: what it does itself, and what the file beside it says."""
    folder.mkdir(parents=True, exist_ok=True)
    inner = byte_pairs("<s>", "</s>")
    if puts:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BEGIN)]
        )
    inner.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | (
        {} if adds is None else {"add_bos_token": adds}
    )
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("puts", [True, False])
@pytest.mark.parametrize("adds", [None, True, False])
def test_a_text_begins_as_transformers_begins_it(
    puts: bool, adds: bool | None, tmp_path: Path
) -> None:
    folder = write(tmp_path / "given", puts=puts, adds=adds)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.begin is not None) == puts
    for text in TEXTS:
        # What `add_bos_token` says does not count where there is a tokenizer.json.
        assert tokenizer.encode_prompt(text) == (theirs(text)["input_ids"] or [END])
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "copy")
    assert (again.begin, again.sha256) == (tokenizer.begin, tokenizer.sha256)


def test_the_user_may_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "given", puts=True, adds=None)
    assert Tokenizer.load(folder, True).sha256 == Tokenizer.load(folder).sha256
    assert Tokenizer.load(folder, False).begin is None
    assert Tokenizer.load(write(tmp_path / "other", puts=False, adds=False), True).begin == BEGIN
    byte_pairs("<|endoftext|>").save(str(tmp_path / "gpt2.json"))
    with pytest.raises(DataError, match="no token to begin a text with"):
        Tokenizer.load(tmp_path / "gpt2.json", True)
    (tmp_path / "a.txt").write_text("some words")
    words = [f"source.path={tmp_path / 'a.txt'}", f"tokenizer.from={tmp_path / 'gpt2.json'}"]
    words += ["tokenizer.bos=true", f"data.path={tmp_path / 'out'}"]
    assert main(["prepare", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tokenizer.bos" in line


def test_documents_of_every_kind_begin_with_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "tokenizer", puts=True, adds=None)
    texts = [f"def read{n}(path):\n    return path\n" for n in range(8)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": t, "completion": "yes"}) + "\n" for t in texts))
    for kind, path in (("texts", source), ("pairs", pairs)):
        for bos in (None, False):
            made = penstock.prepare(
                source={"kind": "jsonl", "path": str(path)},
                tokenizer={"from": str(folder), "bos": bos},
                data={
                    "path": str(tmp_path / f"{kind}-{bos}"),
                    "sequence_length": 64,
                    "packing": "single::drop",
                    "splits": [1, 0, 0],
                },
            ).dataset
            split = made.split("train")
            rows = [document.tolist() for document in read_documents(split)]
            assert len(rows) == len(texts)
            assert all((row[0] == BEGIN) == (bos is None) for row in rows)
            assert all(row.count(BEGIN) == (bos is None) and row[-1] == END for row in rows)
            facts = made.manifest["splits"]["train"]
            assert facts["words"] == sum(len(t.split()) + (kind == "pairs") for t in texts)
            if kind == "pairs" and bos is None:
                assert split.weights is not None
                assert split.weights[:2].tolist() == [0, 0]
    with_it, without = (Dataset.open(tmp_path / f"texts-{bos}") for bos in (None, False))
    assert with_it.tokenizer().begin == BEGIN
    assert without.tokenizer().begin is None


def test_generated_text_and_exports_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", puts=True, adds=None)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, intermediate_size=100, max_position_embeddings=64,
        bos_token_id=BEGIN, eos_token_id=END, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = torch.tensor([theirs("def read(")["input_ids"]])
    assert ids[0, 0] == BEGIN
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=END)
    expected = theirs.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    settings = {"prompt": "def read(", "tokens": 12, "temperature": 0}
    made = penstock.generate(model={"from": str(folder)}, generate=settings)
    assert made.completions[0].text == expected
    other = penstock.generate(
        model={"from": str(folder)}, tokenizer={"bos": False}, generate=settings
    )
    assert other.completions[0].text != expected

    (tmp_path / "a.txt").write_text("def read(path):\n    return path\n" * 20)
    data = {"path": str(tmp_path / "dataset"), "sequence_length": 32, "splits": [1, 0, 0]}
    penstock.prepare(
        source={"path": str(tmp_path / "a.txt")}, tokenizer={"from": str(folder)}, data=data
    )
    penstock.train(
        model={"from": str(folder)},
        data=data,
        batch={"micro": 2},
        compile={"mode": "off"},
        run=str(tmp_path / "run"),
        train={"steps": 1, "report": False, "tensorboard": False},
    )
    penstock.convert("checkpoint", run=str(tmp_path / "run"), out=tmp_path / "out")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("def read(")["input_ids"] == ids[0].tolist()
    assert (exported.bos_token, exported.eos_token) == ("<s>", "</s>")
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "out" / name).read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (BEGIN, END)


def test_data_of_another_tokenizer_than_the_models_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "model", puts=True, adds=None)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    text = tmp_path / "a.txt"
    text.write_text("def read(path):\n    return path\n" * 20)
    data = {"path": str(tmp_path / "dataset"), "sequence_length": 32, "splits": [0.5, 0.5, 0]}
    byte_pairs("<pad>", "<|endoftext|>").save(str(tmp_path / "other.json"))
    penstock.prepare(
        source={"path": str(text)}, tokenizer={"from": str(tmp_path / "other.json")}, data=data
    )
    words = [f"model.from={folder}", f"data.path={data['path']}", "compile.mode=off"]
    words += ["train.steps=1", "train.report=false", "batch.micro=1", "evaluate.split=train"]
    for verb in ("train", "evaluate"):
        run = [f"run={tmp_path / 'run'}"] if verb == "train" else []
        assert main([verb, *words, *run]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "another tokenizer than" in line
        assert "token 0 is '<s>' in one and '<pad>' in the other" in line
    named = f"tokenizer.from={tmp_path / 'other.json'}"
    assert main(["train", *words, f"run={tmp_path / 'run'}", named]) == 0
