"""Tokenizers of other families: which token ends a text, and text that comes back as it was."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

import penstock
from penstock.data.dataset import Dataset
from penstock.data.tokenizer import Tokenizer
from penstock.errors import DataError


@pytest.fixture(scope="module")
def llama_folder(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2's SentencePiece file alone."""
    folder = tmp_path_factory.mktemp("llama")
    file = test_data / "llama-tokenizer" / "tokenizer.model"
    (folder / "tokenizer.model").write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("cut", [1, 40, 5000, -1])
def test_a_damaged_sentence_piece_file_is_one_line(
    cut: int, llama_folder: Path, tmp_path: Path
) -> None:
    data = (llama_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[:cut])
    with pytest.raises(DataError, match=r"tokenizer\.model is (damaged|no byte-pair model)"):
        Tokenizer.load(tmp_path)


def test_llama_2s_tokenizer_loads_and_ends_texts_with_its_own_token(llama_folder: Path) -> None:
    tokenizer = Tokenizer.load(llama_folder)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (32000, 2)
    # As published for Llama 2.
    assert tokenizer.encode("Hello world") == [15043, 3186]
    assert tokenizer.encode_prompt("Hello world") == [1, 15043, 3186]
    for text in ("def f(x):\n    return x\n", " two  spaces ", "naïve 日本語 🜁", "</s> in a text"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids


def test_a_continuation_keeps_the_space_before_its_first_word(llama_folder: Path) -> None:
    tokenizer = Tokenizer.load(llama_folder)
    ids = tokenizer.encode("Hello world and more")
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        assert before + tokenizer.decode_after(ids[:cut], ids[cut:]) == "Hello world and more"
    assert tokenizer.decode_after([], ids) == "Hello world and more"
    assert tokenizer.decode_after([tokenizer.end_of_text], ids) == "Hello world and more"


def test_a_dataset_of_llamas_tokens_comes_back(llama_folder: Path, tmp_path: Path) -> None:
    text = "Some words of a first document.\n" * 60
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name + text)
    penstock.prepare(
        source={"path": str(tmp_path / "*.txt")},
        tokenizer={"from": str(llama_folder)},
        data={"path": tmp_path / "dataset", "sequence_length": 32},
    )
    dataset = Dataset.open(tmp_path / "dataset")
    assert dataset.manifest["tokenizer"]["end_of_text"] == 2
    tokenizer = dataset.tokenizer()
    assert tokenizer.end_of_text == 2
    tokens = dataset.split("train").tokens.tolist()
    assert tokens.count(2) == dataset.manifest["splits"]["train"]["documents"]


def words(*special: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    inner.add_special_tokens(list(special))
    return inner


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (["<|endoftext|>", "</s>"], "<|endoftext|>"),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>"),
        (["<s>", "</s>"], "</s>"),
    ],
)
def test_known_names_are_found(special: list[str], expected: str) -> None:
    tokenizer = Tokenizer(words(*special))
    assert tokenizer.end_of_text_name == expected
    assert tokenizer.decode([tokenizer.end_of_text]) == expected


@pytest.mark.parametrize("value", ["<done>", {"content": "<done>", "special": True}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_configured_end_is_found_and_survives_saving(
    value: object, file: str, tmp_path: Path
) -> None:
    words("<done>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token: none of"):
        Tokenizer.load(tmp_path)
    (tmp_path / file).write_text(json.dumps({"eos_token": value}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.end_of_text == 2
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "copy" / "tokenizer.json")
    assert (again.end_of_text, again.sha256) == (2, tokenizer.sha256)


@pytest.mark.parametrize("content", ["", "[1]", '{"eos_token": 3}', '{"eos_token": null}'])
def test_damaged_settings_are_as_none(content: str, tmp_path: Path) -> None:
    words("<done>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match="no end-of-text token"):
        Tokenizer.load(tmp_path)
