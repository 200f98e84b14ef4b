"""Cleaning: each key does what it says and no more, and the same for any number of workers."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import penstock
from penstock.config.cleaning import CleanSection
from penstock.data.clean import clean
from penstock.data.duplicates import exact_duplicates, near_duplicates, signature
from penstock.data.formats.sequence import TokenSequence
from penstock.data.sources.piece import Piece, Tally


def kept(texts: list[str], **keys: object) -> tuple[list[str], dict[str, int]]:
    tally = Tally()
    pieces = [Piece(text, text, ends=True) for text in texts]
    return [p.text for p in clean(pieces, CleanSection(**keys), tally)], dict(tally.counts)


def test_nothing_is_cleaned_unless_it_is_set() -> None:
    texts = ["", "e\u0301", "12345", "###", "same", "same", "x" * 2_000_000]
    assert kept(texts) == (texts, {})


@pytest.mark.parametrize("form", ["nfc", "nfd", "nfkc", "nfkd"])
def test_normalization_is_unicodes(form: str) -> None:
    texts = ["e\u0301 ﬁne", "한국어", "plain"]
    found, counts = kept(texts, unicode=form)
    assert found == [unicodedata.normalize(form.upper(), text) for text in texts]
    assert counts["pieces of text normalized"] == sum(
        a != b for a, b in zip(texts, found, strict=True)
    )
    pair = Piece("x", "e\u0301\na\u0308", True, pairs=(("e\u0301", "a\u0308"),))
    (made,) = clean([pair], CleanSection(unicode="nfc"), Tally())
    assert made.pairs == (("é", "ä"),)


@pytest.mark.parametrize(
    ("keys", "gone", "reason"),
    [
        ({"min_characters": 5}, "tiny", "too short"),
        ({"max_characters": 50}, "long " * 20, "too long"),
        ({"min_letters": 0.5}, "ab 12345", "too few letters"),
        ({"max_digits": 0.5}, "ab 12345", "too many digits"),
        ({"max_symbols": 0.5}, "ab #####", "too many symbols"),
    ],
)
def test_each_filter_leaves_out_what_it_says(keys: dict, gone: str, reason: str) -> None:
    good = "a good sentence, नमस्ते"
    found, counts = kept([good, gone, good], **keys)
    assert found == [good, good]
    assert counts == {f"documents left out: {reason}": 1}


def test_long_documents_are_judged_as_a_whole() -> None:
    long = [Piece("d", "words " * 100_000, ends=False) for _ in range(4)]
    short = Piece("s", "short words", ends=True)
    last = Piece("d", "end", ends=True)
    section = CleanSection(max_characters=1000)
    found = list(clean([short, *long, last, short], section, Tally()))
    assert found == [short, short]
    section = CleanSection(min_letters=0.1)
    assert list(clean([short, *long, last, short], section, Tally())) == [short, *long, last, short]


def test_languages_are_told_apart() -> None:
    pytest.importorskip("py3langid", reason="the extra `language` is not installed")
    texts = {
        "en": "This is a sentence in the English language, and another one follows it.",
        "de": "Dies ist ein Satz in deutscher Sprache, und ein weiterer folgt ihm nach.",
        "fr": "Ceci est une phrase en langue française, et une autre la suit aussitôt.",
    }
    found, counts = kept(list(texts.values()), languages=("en", "fr"))
    assert found == [texts["en"], texts["fr"]]
    assert counts == {"documents left out: in de": 1}


def documents(*lists: list[int]) -> list[TokenSequence]:
    return [TokenSequence(np.array(tokens)) for tokens in lists]


def test_exact_duplicates_are_the_later_ones() -> None:
    found = exact_duplicates(documents([1, 2], [3], [1, 2], [1, 2, 3], [3], [], []))
    assert found.tolist() == [False, False, True, False, True, False, True]


def jaccard(a: list[int], b: list[int]) -> float:
    first, second = ({tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (a, b))
    return len(first & second) / len(first | second)


def test_signatures_estimate_the_jaccard_similarity() -> None:
    generator = np.random.default_rng(3)
    base = generator.integers(0, 50_000, 3000).tolist()
    for share in (0.02, 0.1, 0.5):
        other = list(base)
        other[: int(3000 * share)] = generator.integers(0, 50_000, int(3000 * share)).tolist()
        equal = (signature(np.array(base)) == signature(np.array(other))).mean()
        # 128 hashes: a standard error of at most 0.044.
        assert abs(equal - jaccard(base, other)) < 0.14


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    lists = [generator.integers(0, 5000, 400).tolist() for _ in range(60)]
    for number in range(0, 20, 2):  # each a copy of the one before with some words changed
        lists[number + 1] = [*lists[number][:390], *range(10)]
    found = near_duplicates(documents(*lists), 0.8, tmp_path)
    assert np.flatnonzero(found).tolist() == list(range(1, 20, 2))
    assert not near_duplicates(documents(*lists), 1.0, tmp_path).any()
    assert not list(tmp_path.iterdir())


def test_duplicates_are_left_out_the_same_by_any_number_of_workers(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    words = ["pipe", "flow", "turbine", "water", "gate", "valve", "head", "loss"]
    texts = [" ".join(generator.choice(words, 60)) for _ in range(80)]
    texts += texts[:20] + [text + " and more" for text in texts[20:30]]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    made = []
    for workers, shard_bytes in ((1, 1 << 24), (2, 8000)):
        out = tmp_path / str(workers)
        dataset = penstock.prepare(
            source={"kind": "jsonl", "path": str(tmp_path / "in.jsonl")},
            clean={"exact_duplicates": True, "near_duplicates": 0.7},
            tokenizer={"train": True, "vocab_size": 300},
            data={"path": str(out)},
            prepare={"workers": workers, "shard_bytes": shard_bytes},
        ).dataset
        facts = dataset.manifest["splits"]
        assert sum(split["documents"] for split in facts.values()) == 80
        assert dataset.manifest["left_out"] == {
            "documents left out: equal to an earlier one": 20,
            "documents left out: nearly equal to an earlier one": 10,
        }
        for name, split in facts.items():
            tokens = dataset.split(name).tokens
            end = dataset.split(name).end_of_text
            text = dataset.tokenizer().decode(tokens[tokens != end].tolist())
            assert split["text_bytes"] == len(text.encode())
        made.append([(out / f"{name}.bin").read_bytes() for name in facts])
    assert made[0] == made[1]


def test_filters_and_large_files_go_together(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_text(f"line of file {number}\n" * 200)
    (tmp_path / "numbers.txt").write_text("1234567890\n" * 500)
    made = []
    for shard_bytes in (1024, 1 << 20):
        out = tmp_path / f"out{shard_bytes}"
        penstock.prepare(
            source={"path": str(tmp_path / "*.txt")},
            clean={"max_digits": 0.5},
            tokenizer={"train": True, "vocab_size": 300},
            data={"path": str(out), "splits": [1, 0, 0]},
            prepare={"workers": 1, "shard_bytes": shard_bytes},
        )
        made.append((out / "train.bin").read_bytes())
    assert made[0] == made[1]
