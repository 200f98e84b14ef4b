"""Articles and rows: SambaNova's own output from its own input, and what packing promises."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data.articles import ArticleRules, pack_articles, tokenize_article
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.data.packing import parse_packing
from penstock.data.tokenizer import Tokenizer

END = 50256


def pairs_of(line: str, suffix: str) -> list[tuple[str, str]]:
    if suffix == ".txt":
        return [("", line)]
    value = json.loads(line)
    return [
        (v.get("prompt", ""), v["completion"])
        for v in (value if isinstance(value, list) else [value])
    ]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("pretraining_txt", "full"),
        ("generative_tuning", "single::drop"),
        ("dialogue", "single::truncate_right"),
    ],
)
def test_golden_files_come_from_their_inputs_array_for_array(
    name: str, packing: str, test_data: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(test_data / "gpt2-tokenizer")
    folder = test_data / "sambanova-prep" / name
    (source,) = (p for p in folder.iterdir() if p.stem == "input")
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    rules = ArticleRules(separate=source.suffix == ".jsonl", keep_prompt_only=True)
    articles = (
        article
        for line in lines
        for article in tokenize_article(pairs_of(line, source.suffix), tokenizer.encode, END, rules)
    )
    layout = Layout(1024, padding=END, vocab_size=tokenizer.vocab_size)
    writer = FORMATS["sambanova"].write(tmp_path, "train", layout)
    for row in pack_articles(articles, parse_packing(packing), 1024, rules):
        writer.append(row)
    writer.finish()
    with h5py.File(folder / "expected.hdf5") as a, h5py.File(tmp_path / "train_1_of_1.hdf5") as b:
        for key in ("input_ids", "token_type_ids"):
            np.testing.assert_array_equal(b[key][:], a[key][:])


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def tokenized(*pairs: tuple[str, str], **rules: object) -> list[tuple[list[int], list[int]]]:
    made = tokenize_article(pairs, letters, 0, ArticleRules(**rules))
    return [(a.tokens.tolist(), a.roles.tolist()) for a in made]


def test_one_space_stands_before_a_completion() -> None:
    expected = [([*letters("ab cd"), 0], [0, 0, 1, 1, 1, 3])]
    for prompt, completion in (("ab", "cd"), ("ab  ", "cd"), ("ab", "   cd"), ("ab ", " cd")):
        assert tokenized((prompt, completion)) == expected
    assert tokenized(("", "cd")) == [([*letters(" cd"), 0], [1, 1, 1, 3])]
    assert tokenized(("ab  ", "cd"), separate=False)[0][0] == [*letters("ab  cd"), 0]
    assert tokenized(("", " cd "), separate=False)[0][0] == [*letters(" cd "), 0]


TURNS = (("a", "b"), ("c", "d"))
TOKENS = [*letters("a b"), 0, *letters("c d"), 0]


def test_a_dialogue_has_an_end_of_text_after_each_turn_and_one_separator() -> None:
    assert tokenized(*TURNS) == [(TOKENS, [0, 1, 1, 1, 0, 1, 1, 3])]
    assert tokenized(*TURNS, attend_pairs=True) == [(TOKENS, [0, 1, 1, 3, 0, 1, 1, 3])]
    parted = [(TOKENS[:4], [0, 1, 1, 1]), (TOKENS[4:], [0, 1, 1, 3])]
    assert tokenized(*TURNS, pack_pairs=True) == parted


def test_a_separator_may_end_each_pair_and_texts_enclose_prompts() -> None:
    pairs = (("a", "b"), ("", "c"))
    assert tokenized(*pairs, attend_pairs=True) == [
        ([*letters("a b"), 0, *letters(" c"), 0], [0, 1, 1, 3, 1, 1, 3])
    ]
    # As the tool has it: spaces go first, and what has no prompt is not enclosed.
    assert tokenized(("a  ", "b"), ("", "c"), prefix="<", postfix="> ") == [
        ([*letters("<a>  b"), 0, *letters(" c"), 0], [0, 0, 0, 0, 1, 1, 1, 1, 1, 3])
    ]


def test_prompts_weigh_what_the_rules_say() -> None:
    (made,) = tokenize_article(TURNS, letters, 0, ArticleRules(prompt_weight=0.5))
    assert made.loss_weights().tolist() == [0.5, 1, 1, 1, 0.5, 1, 1, 1]


def test_pairs_without_a_completion_are_left_out_unless_kept() -> None:
    assert tokenized(("a", ""), ("c", "d")) == [([*letters("c d"), 0], [0, 1, 1, 3])]
    assert tokenized(("a", "")) == [([], [])]
    assert tokenized(("a", ""), keep_prompt_only=True) == [([97, 0], [0, 3])]


def article(*tokens: int) -> TokenSequence:
    return TokenSequence(np.array(tokens), None, np.ones(len(tokens), np.uint8))


@pytest.mark.parametrize(
    ("packing", "rows"),
    [
        ("full", [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]),
        ("greedy::drop", [[1, 2], [8, 9, 10, 11]]),
        ("greedy::truncate_left", [[1, 2], [4, 5, 6, 7], [8, 9, 10, 11]]),
        ("greedy::truncate_right", [[1, 2], [3, 4, 5, 6], [8, 9, 10, 11]]),
        ("single::drop", [[1], [2], [8, 9], [10, 11]]),
        ("single::truncate_right", [[1], [2], [3, 4, 5, 6], [8, 9], [10, 11]]),
    ],
)
def test_each_packing(packing: str, rows: list[list[int]]) -> None:
    articles = [article(1), article(2), article(3, 4, 5, 6, 7), article(8, 9), article(10, 11)]
    made = pack_articles(articles, parse_packing(packing), 4)
    assert [row.tokens.tolist() for row in made] == rows


@pytest.mark.parametrize(
    ("packing", "rows"),
    [
        ("greedy::drop", [[0, 1], [2, 3]]),
        ("greedy::truncate_left", [[0, 1], [2, 3], [5, 6, 7]]),
        ("greedy::truncate_right", [[0, 1], [2, 3], [4, 5, 6]]),
        ("full", [[0, 1, 2], [3, 4, 5], [6, 7]]),
        ("single::drop", [[0, 1], [2, 3]]),
        ("single::truncate_left", [[0, 1], [2, 3], [5, 6, 7]]),
        ("single::truncate_right", [[0, 1], [2, 3], [4, 5, 6]]),
    ],
)
def test_packing_is_that_of_the_tools_own_documentation(
    packing: str, rows: list[list[int]]
) -> None:
    articles = [article(0, 1), article(2, 3), article(4, 5, 6, 7)]
    made = pack_articles(articles, parse_packing(packing), 3, ArticleRules(keep_prompt_only=True))
    assert [row.tokens.tolist() for row in made] == rows


def rows_of(roles: list[int], packing: str, **rules: object) -> list[list[int]]:
    kinds = np.array(roles, np.uint8)
    whole = TokenSequence(np.arange(len(roles)), (kinds > 0).astype(np.float32), kinds)
    made = pack_articles([whole], parse_packing(packing), 4, ArticleRules(**rules))
    return [row.tokens.tolist() for row in made]


def test_rows_without_a_completion_are_left_out_unless_kept() -> None:
    roles = [0, 0, 0, 0, 0, 0, 0, 3, 1, 3]
    assert rows_of(roles, "full") == [[8, 9]]
    assert rows_of(roles, "full", keep_prompt_only=True) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert rows_of(roles, "single::truncate_right") == []
    # The tool does not look at the row it has begun at the end, be it full or not.
    assert rows_of([0, 0, 0, 0], "full") == [[0, 1, 2, 3]]
    assert rows_of([1, 1, 1, 1, 0], "full") == [[0, 1, 2, 3], [4]]
    # It ended an empty row before an article that fits none until 2023, a row of padding; no longer.
    assert rows_of([1] * 5, "greedy::truncate_left") == [[1, 2, 3, 4]]
    assert rows_of([1] * 5, "greedy::truncate_left", keep_prompt_only=True) == [[1, 2, 3, 4]]


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=20), st.integers(1, 12))
def test_full_packing_loses_and_moves_nothing(lists: list[list[int]], width: int) -> None:
    articles = [article(*tokens) for tokens in lists]
    rows = list(pack_articles(articles, parse_packing("full"), width))
    flat = [token for tokens in lists for token in tokens]
    assert [int(t) for row in rows for t in row.tokens] == flat
    assert all(len(row.tokens) == width for row in rows[:-1])
    assert all(len(row.roles) == len(row.tokens) for row in rows)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), max_size=20), st.integers(1, 12)
)
def test_greedy_packing_keeps_articles_whole(lists: list[list[int]], width: int) -> None:
    articles = [article(*tokens) for tokens in lists]
    rows = list(pack_articles(articles, parse_packing("greedy::drop"), width))
    kept = [tokens for tokens in lists if len(tokens) <= width]
    assert [int(t) for row in rows for t in row.tokens] == [t for tokens in kept for t in tokens]
    borders = np.cumsum([0] + [len(tokens) for tokens in kept]).tolist()
    assert set(np.cumsum([len(row.tokens) for row in rows]).tolist()) <= set(borders)
    assert all(0 < len(row.tokens) <= width for row in rows)
    # Where nothing is dropped, no row could have taken in the article that begins the next one.
    first = dict(zip(borders, kept, strict=False)) if len(kept) == len(lists) else {}
    ends = np.cumsum([len(row.tokens) for row in rows]).tolist()
    for row, end in zip(rows, ends[:-1], strict=False):
        assert len(row.tokens) + len(first.get(end, range(width))) > width
