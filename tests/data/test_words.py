"""Tokens by words are the tokenizer's own, for every character and any text."""

import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from penstock.data import words
from penstock.data.tokenizer import Tokenizer
from penstock.data.words import cut_words, takes_words

SAMPLE = "It's the naïve café's 3rd résumé; they'll say \"we've\" — don't they? 漢字 слово שלום \n\n\tx = y[0]  # ok\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([SAMPLE * 20], 400)


def own(tokenizer: Tokenizer, text: str) -> list[int]:
    """By the library, the whole text at once."""
    return tokenizer._inner.encode(text, add_special_tokens=False).ids


def test_every_known_character_is_cut_as_the_library_cuts_it() -> None:
    _, unknown = words._expressions()
    known = [chr(code) for code in range(1 << 16) if unknown.search(chr(code)) is None]
    assert len(known) > 50_000
    assert set("aß3²Ⅷ жشא漢カ한\t\n\r\x1c\x85\xa0\u3000–€“") <= set(known)
    assert all(unicodedata.category(character) not in ("Cn", "Cs") for character in known)
    text = "".join(f"a{c}b 1{c}1 {c}{c}'{c} {c}\n!{c}!{c}s {c}  {c}" for c in known)
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = [text[slice(*place)] for _, place in cutter.pre_tokenize_str(text)]
    assert cut_words(text) == theirs


ALPHABET = (
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from("  \n\n\t\r'stmdrevl1a!-é漢🙂\u180e\u200b\x1c\x00")
    | st.sampled_from(["'s", "'ll", " \n", "!\nx", "<|endoftext|>", "🙂\n"])
)


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.lists(ALPHABET, max_size=40).map("".join), max_size=4))
def test_any_text_has_the_librarys_tokens(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert takes_words(tokenizer._inner)
    found = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in found] == [own(tokenizer, text) for text in texts]
    assert all("".join(cut_words(text)) == text for text in texts)


@pytest.mark.data
def test_real_text_has_the_librarys_tokens(test_data: Path) -> None:
    tokenizer = Tokenizer.load(test_data / "gpt2-tokenizer")
    text = (test_data / "wikitext-2" / "valid.txt").read_text("utf-8")
    assert tokenizer.encode_batch([text])[0].tolist() == own(tokenizer, text)


def test_what_is_remembered_is_bounded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_KEPT", 50)
    encoder = words.WordEncoder(tokenizer._encode_each)
    for number in range(40):
        text = f"{SAMPLE} {number} {'long' * number} x{number}🙂"
        assert encoder([text])[0].tolist() == own(tokenizer, text)
        assert len(encoder._known) <= 50
        assert max(map(len, encoder._known), default=0) <= words._LONGEST


def test_threads_may_share_an_encoder(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_KEPT", 20)
    encoder = words.WordEncoder(tokenizer._encode_each)
    wrong: list[str] = []

    def work(thread: int) -> None:
        for number in range(200):
            text = f"the {thread * number} café {'a' * (number % 80)}"
            if encoder([text])[0].tolist() != own(tokenizer, text):
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_other_tokenizers_are_left_to_the_library(tokenizer: Tokenizer) -> None:
    def changed(**parts: object) -> tokenizers.Tokenizer:
        inner = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
        for name, part in parts.items():
            setattr(inner, name, part)
        return inner

    assert takes_words(changed())
    assert not takes_words(changed(normalizer=normalizers.NFC()))
    assert not takes_words(changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not takes_words(changed(pre_tokenizer=pre_tokenizers.Whitespace()))
    assert not takes_words(changed(model=models.BPE(dropout=0.1)))
    with_word = changed()
    with_word.add_tokens(["fused words"])
    assert not takes_words(with_word)
    found = Tokenizer(with_word).encode_batch(["some fused words"])[0]
    assert found[-1] == with_word.token_to_id("fused words")
    assert found.dtype == np.int32
