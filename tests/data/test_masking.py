"""Which tokens are hidden from a masked language model, and tokenizers that can hide them."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from penstock.data.masking import Masking
from penstock.data.objective import Objective
from penstock.data.samples import Row
from penstock.data.tokenizer import Tokenizer
from penstock.errors import DataError

TEXT = ["The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 20]


def masking(seed: int = 3, probability: float = 0.15) -> Masking:
    return Masking(
        mask_token=4,
        special_tokens=(0, 1, 2, 3, 4),
        vocab_size=1000,
        probability=probability,
        seed=seed,
    )


def test_fifteen_percent_are_chosen_and_replaced_80_10_10() -> None:
    tokens = np.random.default_rng(0).integers(5, 1000, 200_000)
    inputs, weights = masking().mask(tokens, len(tokens), 0)
    chosen = weights > 0
    # Four standard deviations of 200,000 and of 30,000 draws.
    assert abs(chosen.mean() - 0.15) < 0.0032
    replaced, same = (inputs == 4)[chosen].mean(), (inputs == tokens)[chosen].mean()
    assert abs(replaced - 0.8) < 0.0093
    assert abs(same - 0.1) < 0.007
    others = inputs[chosen & (inputs != 4) & (inputs != tokens)]
    assert abs(len(others) / chosen.sum() - 0.1) < 0.007
    assert abs(others.mean() - 500) < 25
    assert np.array_equal(inputs[~chosen], tokens[~chosen])


def test_special_tokens_and_padding_are_never_chosen() -> None:
    tokens = np.arange(2000) % 10
    _, weights = masking(probability=0.9).mask(tokens, 1500, 0)
    assert not weights[tokens < 5].any()
    assert not weights[1500:].any()
    assert weights[:1500][tokens[:1500] >= 5].mean() > 0.8


def test_the_mask_depends_on_seed_and_position_alone() -> None:
    tokens = np.random.default_rng(0).integers(5, 1000, 500)
    first = masking().mask(tokens, 500, 7)
    assert all(
        np.array_equal(*pair) for pair in zip(first, masking().mask(tokens, 500, 7), strict=True)
    )
    for other in (masking().mask(tokens, 500, 8), masking(seed=4).mask(tokens, 500, 7)):
        assert (first[1] != other[1]).sum() > 50


def test_targets_are_the_tokens_themselves_and_padding_is_apart() -> None:
    tokens = np.random.default_rng(0).integers(5, 1000, 64)
    row = Row(tokens, np.roll(tokens, -1), np.ones(64, np.float32), 40)
    task = Objective(masking=masking()).of(row, 5)
    assert np.array_equal(task.targets, tokens)
    assert task.segments.tolist() == [0] * 40 + [-1] * 24
    assert 0 < task.weights.sum() == (task.weights > 0).sum()


@pytest.mark.parametrize(
    ("kind", "begin", "end", "mask"),
    [("roberta", "<s>", "</s>", "<mask>"), ("bert", "[CLS]", "[SEP]", "[MASK]")],
)
def test_trained_tokenizers_load_in_transformers_and_enclose_texts(
    kind: str, begin: str, end: str, mask: str, tmp_path: Path
) -> None:
    made = Tokenizer.train(TEXT, 400, kind)
    made.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == made.sha256
    assert (again.end_of_text_name, again.masked.end) == (end, end)
    assert again.special_ids == (0, 1, 2, 3, 4)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), **made.special_tokens
    )
    ids = theirs("the quick dog")["input_ids"]
    assert ids == [again.masked.begin, *again.encode("the quick dog"), again.end_of_text]
    assert theirs.convert_ids_to_tokens([ids[0], ids[-1]]) == [begin, end]
    assert theirs.mask_token_id == again.masked.mask
    assert again.masked.mask not in again.encode(f"a {mask} b")
    assert again.decode(again.encode("the quick dog")).strip() == "the quick dog"


def test_berts_vocabulary_file_loads_as_transformers_reads_it(tmp_path: Path) -> None:
    Tokenizer.train(TEXT, 300, "bert").save(tmp_path / "made" / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    words = sorted(inner.get_vocab().items(), key=lambda item: item[1])
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    text = "The lazy Fox, jumping över dogs!"
    ours = Tokenizer.load(folder)
    assert [ours.masked.begin, *ours.encode(text), ours.end_of_text] == theirs(text)["input_ids"]
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.load(folder).encode("Fox") != ours.encode("Fox")


def test_robertas_two_files_have_its_special_tokens(tmp_path: Path) -> None:
    Tokenizer.train(TEXT, 300, "roberta").save(tmp_path / "made" / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    inner.model.save(str(tmp_path))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.masked.roles["mask_token"] == "<mask>"
    assert loaded.end_of_text_name == "</s>"
    assert loaded.encode("the dog") == Tokenizer.load(tmp_path / "made").encode("the dog")


def test_a_folder_without_a_tokenizer_says_what_one_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab\.json and merges\.txt, vocab\.txt or"):
        Tokenizer.load(tmp_path)
