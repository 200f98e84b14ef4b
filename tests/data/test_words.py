"""Tokens by words are the tokenizer's own, for every character and any text."""

import json
import re
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from penstock.data import word_cuts, words
from penstock.data.tokenizer import Tokenizer
from penstock.data.word_cuts import word_cut

SAMPLE = "It's the naïve café's 3rd résumé; they'll say \"we've\" — don't they? 漢字 слово שלום \n\n\tx = y[0]  # ok 12345\n"


def split_at(pattern: str) -> pre_tokenizers.PreTokenizer:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_alone])


def byte_level(**parts: object) -> Tokenizer:
    """A byte-level BPE of a few hundred merges, some of its parts others."""
    inner = tokenizers.Tokenizer.from_str(Tokenizer.train([SAMPLE * 20], 400)._inner.to_str())
    for name, part in parts.items():
        setattr(inner, name, part)
    return Tokenizer(inner)


def neox() -> Tokenizer:
    """With runs of spaces as tokens that are found in the text, and NFC, as GPT-NeoX has them."""
    made = byte_level(normalizer=normalizers.NFC())
    made._inner.add_tokens([AddedToken(" " * n, normalized=True) for n in range(2, 9)])
    return made


def word_pieces(lowercase: bool) -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(
        Tokenizer.train([SAMPLE * 20], 400, "bert")._inner.to_str()
    )
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=None)
    return Tokenizer(inner)


def sentence_pieces(scheme: str | None, split: bool = False) -> Tokenizer:
    """Byte pairs over spaces as U+2581, bytes for what is unknown; Llama's normalizer for None."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", True)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    text = SAMPLE.replace("\n", " ").replace("漢字", "").lower() + "    a        b "
    inner.train_from_iterator([text] * 20, trainer)
    state = json.loads(inner.to_str())
    state["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    state["added_tokens"] = state["added_tokens"][:3]
    if scheme is None:
        state["pre_tokenizer"] = None
        state["normalizer"] = word_cuts._PREPENDS
    else:
        state["pre_tokenizer"] |= {"prepend_scheme": scheme, "split": split}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "gpt-neox": neox,
    "llama3": lambda: byte_level(pre_tokenizer=split_at(word_cuts._LLAMA3)),
    "qwen": lambda: byte_level(
        pre_tokenizer=split_at(word_cuts._QWEN), normalizer=normalizers.NFC()
    ),
    "bert": lambda: word_pieces(lowercase=True),
    "bert-cased": lambda: word_pieces(lowercase=False),
    "llama2": lambda: sentence_pieces(None),
    "metaspace": lambda: sentence_pieces("first"),
    "metaspace-split": lambda: sentence_pieces("always", split=True),
    "metaspace-never": lambda: sentence_pieces("never"),
}


@pytest.fixture(scope="module", params=KINDS)
def any_kind(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level()


def own(tokenizer: Tokenizer, text: str) -> list[int]:
    """By the library, the whole text at once."""
    return tokenizer._inner.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pattern", [word_cuts._GPT2, word_cuts._LLAMA3, word_cuts._QWEN])
def test_every_known_character_is_cut_as_the_library_cuts_it(pattern: str) -> None:
    cutter, unknown = word_cuts._expressions(pattern, composes=False)
    known = [chr(code) for code in range(1 << 16) if unknown.search(chr(code)) is None]
    assert len(known) > 50_000
    assert set("aß3²Ⅷ жشא漢カ한\t\n\r\x1c\x85\xa0\u3000–€“\u0301ſ") <= set(known)
    assert all(unicodedata.category(character) not in ("Cn", "Cs") for character in known)
    text = "".join(f"a{c}b 1{c}1 {c}{c}'{c} {c}\n!{c}!{c}s'{c}e {c}  {c}12345" for c in known)
    theirs = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
    assert cutter.findall(text) == [text[slice(*place)] for _, place in theirs]


def test_what_normalization_composes_is_left_to_the_library() -> None:
    _, unknown = word_cuts._expressions(word_cuts._GPT2, composes=True)
    known = [chr(code) for code in range(1 << 16) if unknown.search(chr(code)) is None]
    assert set("aéß漢한カж–") <= set(known)
    assert not set("\u0301\u0340\u1161\u11a8\u3099\u212b\u0f73\uf900\u0344\u09be") & set(known)
    joined = "".join(known)
    for text in (joined, joined[::-1], "a".join(known), "한".join(known)):
        assert unicodedata.normalize("NFC", text) == text
        assert normalizers.NFC().normalize_str(text) == text


ALPHABET = (
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from("  \n\n\t\r'stmdrevl1a!-é漢🙂\u180e\u200b\x1c\x00▁\u0301\u0323\xa0\ufffdİ")
    | st.sampled_from(["'s", "'LL", " \n", "!\nx", "<|endoftext|>", "🙂\n", "</s>", "<0x0A>"])
    | st.sampled_from(["the ", " they", "123456", "   ", "\n\n", "[MASK]", "e\u0301", "\r\n", "café"])
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.lists(ALPHABET, max_size=40).map("".join), max_size=4))
def test_any_text_has_the_librarys_tokens(any_kind: Tokenizer, texts: list[str]) -> None:
    assert any_kind._words is not None
    found = any_kind.encode_batch(texts)
    assert [ids.tolist() for ids in found] == [own(any_kind, text) for text in texts]


@pytest.mark.data
@pytest.mark.parametrize("folder", ["gpt2-tokenizer", "llama-tokenizer"])
def test_real_text_has_the_librarys_tokens(test_data: Path, folder: str) -> None:
    tokenizer = Tokenizer.load(test_data / folder)
    assert tokenizer._words is not None
    text = (test_data / "wikitext-2" / "valid.txt").read_text("utf-8")[:400_000]
    assert tokenizer.encode_batch([text])[0].tolist() == own(tokenizer, text)


@pytest.mark.data
def test_real_text_has_the_librarys_tokens_of_every_kind(
    any_kind: Tokenizer, test_data: Path
) -> None:
    text = (test_data / "wikitext-2" / "valid.txt").read_text("utf-8")[:50_000]
    assert any_kind.encode_batch([text])[0].tolist() == own(any_kind, text)


def test_what_is_remembered_is_bounded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_KEPT", 50)
    encoder = words.WordEncoder.of(tokenizer._inner)
    assert encoder is not None
    for number in range(40):
        text = f"{SAMPLE} {number} {'long' * number} x{number}🙂"
        assert encoder([text])[0].tolist() == own(tokenizer, text)
        assert len(encoder._known) <= 50
        assert max(map(len, encoder._known), default=0) <= words._LONGEST


def test_threads_may_share_an_encoder(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_KEPT", 20)
    encoder = words.WordEncoder.of(tokenizer._inner)
    assert encoder is not None
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


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.NFKC()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": split_at(word_cuts._GPT2 + "|x")},
        {"model": models.BPE(dropout=0.1)},
    ],
)
def test_other_tokenizers_are_left_to_the_library(parts: dict[str, object]) -> None:
    assert word_cut(byte_level()._inner) is not None
    assert word_cut(byte_level(**parts)._inner) is None


def test_a_vocabulary_with_pieces_over_spaces_is_left_to_the_library() -> None:
    state = json.loads(sentence_pieces("first")._inner.to_str())
    state["model"]["vocab"]["e▁"] = len(state["model"]["vocab"])
    state["model"]["merges"].append(["e", "▁"])
    inner = tokenizers.Tokenizer.from_str(json.dumps(state))
    assert word_cut(inner) is None
    state["model"] |= {"byte_fallback": False}
    assert word_cut(tokenizers.Tokenizer.from_str(json.dumps(state))) is None


def test_added_tokens_are_found_in_the_text(tokenizer: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    inner.add_tokens(["fused words", "<call>"])
    made = Tokenizer(inner)
    texts = ["some fused words", "they'll fused words\nsay <call>\nwe've\n<call>x", "fused  words"]
    found = made.encode_batch(texts)
    assert made._words is not None
    assert inner.token_to_id("fused words") == found[0][-1]
    assert [ids.tolist() for ids in found] == [own(made, text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in found)
    for token in (AddedToken("call", lstrip=True), AddedToken("a\nb"), AddedToken("é")):
        other = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
        other.add_tokens([token])
        assert word_cut(other) is None


def test_cuts_are_of_the_text_alone(tokenizer: Tokenizer) -> None:
    found = word_cut(tokenizer._inner)
    assert found is not None
    text = f"{SAMPLE}x\ny 🙂 z\nw{SAMPLE}"
    assert "".join(found.cut(text)) == text
    assert len(found.cut(text)) > len(re.findall(r"\w+", text))
