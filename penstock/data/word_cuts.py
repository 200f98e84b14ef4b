"""Where text may be cut without changing its tokens, for the tokenizers of known families.

`data/words.py` remembers the tokens of what is cut here. It must never encode text.

A tokenizer first changes the text (its normalizer), then cuts it (its pre-tokenizer), then makes
tokens of each part by itself (its model). Where both of the first work in a way that is known here,
text is cut in the same places or in fewer of them:

- byte-level BPE behind a regular expression, those of GPT-2 (openai/gpt-2, src/encoder.py; also
  GPT-J's, GPT-NeoX's and RoBERTa's), Llama 3 and Qwen, with NFC before it or nothing;
- BERT's word pieces: white space and punctuation of ASCII always part words;
- SentencePiece's byte pairs, such as Llama 2's: no piece of such a vocabulary goes on over a space.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

Cut = Callable[[str], list[str]]
"""Words of a text, whose tokens one after the other are the text's."""
_GPT2 = r" ?\p{L}+|'(?:[stmd]|re|ve|ll)| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Letters come first here, which is faster: what they match cannot begin like a contraction."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace("{1,3}", "")
_BETWEEN = r"(?<=[!-~])(\n)(?=[!-~])"
"""A newline between two printing characters is a word of its own: GPT-2."""
_BEHIND = r"(?<=\n)(?=[!-~])"
"""A word ends with a newline before a printing character: Llama 3, Qwen."""
_SPACES = frozenset(
    map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029))
) | frozenset("\u202f\u205f\u3000")
"""Unicode's White_Space; what Python's own `\\s` matches beside it is not."""
_WORD_PIECE = re.compile(r"[^ \t\n\r!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")
_PIECE = re.compile(r"[ ▁]*[^ ▁]+|[ ▁]+")
_PIECE_OF_LINE = re.compile(r"[ ▁]*[^ ▁\n]+|[ ▁]+|\n")
_SPACE = "▁"
_PREPENDS = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}
"""Llama 2's normalizer."""


class WordCut(NamedTuple):
    """How text is cut, and what makes tokens of its words."""

    cut: Cut
    inner: tokenizers.Tokenizer


def word_cut(inner: tokenizers.Tokenizer) -> WordCut | None:
    """How to cut text for a tokenizer that looks for no special tokens in it; None: unknown."""
    model = inner.model
    if isinstance(model, models.WordPiece):
        return _word_piece_cut(inner)
    known = isinstance(model, models.BPE) and not (
        model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix
    )
    return (_byte_level_cut(inner) or _sentence_piece_cut(inner)) if known else None


def _state(part: object) -> dict[str, Any]:
    """A normalizer's or pre-tokenizer's settings as tokenizer.json has them."""
    # The library's stubs do not have the state that its own pickling and its files go by.
    return {} if part is None else json.loads(part.__getstate__())  # type: ignore[arg-type]


def _added(inner: tokenizers.Tokenizer) -> list[tokenizers.AddedToken]:
    """Tokens that are found in the text before anything else happens to it."""
    return [token for token in inner.get_added_tokens_decoder().values() if not token.special]


def _word_piece_cut(inner: tokenizers.Tokenizer) -> WordCut | None:
    """Decomposition, accents and case never reach over a character of ASCII."""
    kinds = (_state(inner.normalizer).get("type"), _state(inner.pre_tokenizer).get("type"))
    if kinds not in (("BertNormalizer", "BertPreTokenizer"), (None, "BertPreTokenizer")):
        return None
    return None if _added(inner) else WordCut(_WORD_PIECE.findall, inner)


def _sentence_piece_cut(inner: tokenizers.Tokenizer) -> WordCut | None:
    """Byte pairs are never merged over a space that follows another character.

    The space before the text comes from the normalizer (as Llama 2's files have it) or from the
    pre-tokenizer (as newer ones do). Words get none, so they are encoded without either.
    """
    space = _state(inner.pre_tokenizer)
    always = _state(inner.normalizer) == _PREPENDS and not space
    metaspace = inner.normalizer is None and space.get("type") == "Metaspace"
    vocabulary = inner.get_vocab(with_added_tokens=False)
    if (
        not (always or (metaspace and space["replacement"] == _SPACE))
        or _added(inner)
        or inner.model.ignore_merges
        or not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        or not inner.model.byte_fallback
        or any(re.search(f"[^{_SPACE}]{_SPACE}", piece) for piece in vocabulary)
    ):
        return None
    bare = tokenizers.Tokenizer.from_str(inner.to_str())
    bare.encode_special_tokens = True
    bare.normalizer = normalizers.Replace(" ", _SPACE)  # type: ignore[assignment]
    bare.pre_tokenizer = None  # type: ignore[assignment]
    joins = any("\n" in piece or re.search("<0x0A>.|.<0x0A>", piece) for piece in vocabulary)
    words = _PIECE if joins else _PIECE_OF_LINE
    if metaspace and space["prepend_scheme"] == "never":
        return WordCut(words.findall, _metaspaced(bare, space))

    def cut(text: str) -> list[str]:
        spaced = not text or (metaspace and text[0] in (" ", _SPACE))
        return words.findall(text if spaced else _SPACE + text)

    return WordCut(cut, _metaspaced(bare, space) if metaspace else bare)


def _metaspaced(bare: tokenizers.Tokenizer, space: dict[str, Any]) -> tokenizers.Tokenizer:
    """With the pre-tokenizer that cuts at spaces, where that is asked for, and adds none."""
    bare.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "never", space["split"])  # type: ignore[assignment]
    return bare


def _byte_level_cut(inner: tokenizers.Tokenizer) -> WordCut | None:
    """The regular expression, by characters that count the same in every version of Unicode.

    Text with any other character, or with an added token, is cut into lines, and a line with one
    is left to the tokenizer as a whole.
    """
    found = _expression(_state(inner.pre_tokenizer))
    normalizer = _state(inner.normalizer).get("type")
    added = _added(inner)
    if found is None or normalizer not in (None, "NFC"):
        return None
    # A token that takes the white space around it, or has an end of line, may reach over a cut.
    if any(
        token.lstrip
        or token.rstrip
        or token.single_word
        or not re.fullmatch("[ -~]+", token.content)
        for token in added
    ):
        return None
    words, unknown = _expressions(found[0], composes=normalizer == "NFC")
    texts = [token.content for token in added]
    shortest = [one for one in texts if not any(other in one for other in texts if other != one)]
    line = re.compile(found[1])

    def whole(text: str) -> bool:
        return unknown.search(text) is not None or any(token in text for token in shortest)

    def cut(text: str) -> list[str]:
        if not whole(text):
            return words.findall(text)
        parts = ([part] if whole(part) else words.findall(part) for part in line.split(text))
        return list(itertools.chain.from_iterable(parts))

    return WordCut(cut, inner)


def _expression(cutter: dict[str, Any]) -> tuple[str, str] | None:
    """The expression of a byte-level pre-tokenizer, and the one that cuts lines for it."""
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if cutter.get("type") == "ByteLevel":
        plain = cutter["use_regex"] and not cutter["add_prefix_space"]
        return (_GPT2, _BETWEEN) if plain else None
    parts = cutter.get("pretokenizers", [])
    for pattern in (_LLAMA3, _QWEN):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        wanted = [{**split, "invert": False}, bytes_alone]
        if [{k: v for k, v in part.items() if k != "trim_offsets"} for part in parts] == wanted:
            return pattern, _BEHIND
    return None


@functools.cache
def _expressions(pattern: str, composes: bool) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """One for words, one for characters that are not known.

    Known are those of the Basic Multilingual Plane whose kind has not changed since Unicode 3.2;
    with `composes`, of those the ones that NFC leaves as they are whatever stands beside them.
    """
    kinds: dict[str, list[str]] = {"letter": [], "number": [], "space": [], "other": []}
    composed = _composed() if composes else frozenset[str]()
    for code in range(1 << 16):
        character = chr(code)
        kind = unicodedata.category(character)[0]
        if kind != unicodedata.ucd_3_2_0.category(character)[0] or (kind == "C" and code > 0x9F):
            continue
        if character not in composed:
            name = {"L": "letter", "N": "number"}.get(kind, "other")
            kinds["space" if character in _SPACES else name].append(character)
    letter, number, space, _ = classes = ["".join(_ranges(chars)) for chars in kinds.values()]
    inside = {r"\p{L}": letter, r"\p{N}": number, r"\s": space}
    in_brackets = re.sub(r"\[\^.*?\]", lambda found: _replace(found[0], inside), pattern)
    alone = {name: f"[{text}]" for name, text in inside.items()} | {r"\S": f"[^{space}]"}
    return re.compile(_replace(in_brackets, alone)), re.compile(f"[^{''.join(classes)}]")


@functools.cache
def _composed() -> frozenset[str]:
    """Characters that NFC may change, or put together with one before them (Unicode, UAX #15)."""
    found = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    for code in range(1 << 16):
        character = chr(code)
        if unicodedata.normalize("NFC", character) != character or unicodedata.combining(character):
            found.add(character)
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(chr(int(parts[1], 16)))
    return frozenset(found)


def _replace(text: str, by: dict[str, str]) -> str:
    for name, value in by.items():
        text = text.replace(name, value)
    return text


def _ranges(characters: Sequence[str]) -> Iterator[str]:
    """Characters in order as the ranges of a class."""
    first = 0
    for place in range(1, len(characters) + 1):
        if place == len(characters) or ord(characters[place]) != ord(characters[place - 1]) + 1:
            yield f"{re.escape(characters[first])}-{re.escape(characters[place - 1])}"
            first = place
