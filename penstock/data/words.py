"""Text cut into words whose tokens are looked up, for tokenizers that take each word by itself.

`data/tokenizer.py` encodes batches through it where it may. GPT-2's byte-level BPE first cuts text
by a regular expression and then merges within each word, so that a word has the same tokens
wherever it stands. Text repeats few words: cutting it here and asking the tokenizer for each word
once is some five times as fast as handing it the text. It must never know what a document is.

Source of the expression: openai/gpt-2, src/encoder.py. Characters count here as letters, numbers
and white space only where Unicode has not changed its mind since version 3.2; a line with any other
is encoded as a whole by the tokenizer itself.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers

Encode = Callable[[Sequence[str]], Iterable[Sequence[int]]]
"""Token ids of each text by the tokenizer itself."""
_KEPT = 1 << 18
"""Words whose tokens are remembered: some 50 MB."""
_LONGEST = 64
"""Characters of a word that is worth remembering."""
_LINE = re.compile(r"(?<=[!-~])(\n)(?=[!-~])")
"""A newline between two printing characters is a word of its own."""
_SPACES = frozenset(
    map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029))
) | frozenset("\u202f\u205f\u3000")
"""Unicode's White_Space; what Python's own `\\s` matches beside it is not."""


class WordEncoder:
    """The tokens of texts by their words, remembered."""

    def __init__(self, encode: Encode) -> None:
        """`encode` gives the tokens of a word."""
        self._encode = encode
        self._known: dict[str, bytes] = {}

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text."""
        cut = [cut_words(text) for text in texts]
        # Taken once: another thread may put an empty one in its place.
        known = self._known
        new = [word for word in set(itertools.chain.from_iterable(cut)) if word not in known]
        found = {
            word: np.array(ids, np.int32).tobytes()
            for word, ids in zip(new, self._encode(new), strict=True)
        }
        long = {word: found.pop(word) for word in new if len(word) > _LONGEST}
        known.update(found)
        if len(known) > _KEPT:
            self._known = {}
        look_up = known.__getitem__ if not long else {**known, **long}.__getitem__
        return [np.frombuffer(b"".join(map(look_up, words)), np.int32) for words in cut]


def takes_words(inner: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer merges within the words of GPT-2's expression and does nothing else.

    Special tokens must not be looked for in the text.
    """
    model, cutter = inner.model, inner.pre_tokenizer
    return (
        isinstance(model, models.BPE)
        and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
        and isinstance(cutter, pre_tokenizers.ByteLevel)
        and cutter.use_regex
        and not cutter.add_prefix_space
        and inner.normalizer is None
        and all(token.special for token in inner.get_added_tokens_decoder().values())
    )


def cut_words(text: str) -> list[str]:
    """The text's words; lines with characters that are not known stay whole."""
    words, unknown = _expressions()
    if unknown.search(text) is None:
        return words.findall(text)
    found: list[str] = []
    for line in _LINE.split(text):
        if unknown.search(line) is None:
            found += words.findall(line)
        else:
            found.append(line)
    return found


@functools.cache
def _expressions() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """One for words, one for characters that are not known."""
    kinds: dict[str, list[str]] = {"letter": [], "number": [], "space": [], "other": []}
    for code in range(1 << 16):
        character = chr(code)
        kind = unicodedata.category(character)[0]
        if kind != unicodedata.ucd_3_2_0.category(character)[0] or (kind == "C" and code > 0x9F):
            continue
        name = {"L": "letter", "N": "number"}.get(kind, "other")
        kinds["space" if character in _SPACES else name].append(character)
    letter, number, space, _ = classes = ["".join(_ranges(chars)) for chars in kinds.values()]
    words = (
        rf" ?[{letter}]+|'(?:[stmd]|re|ve|ll)| ?[{number}]+| ?[^{space}{letter}{number}]+"
        rf"|[{space}]+(?![^{space}])|[{space}]+"
    )
    return re.compile(words), re.compile(f"[^{''.join(classes)}]")


def _ranges(characters: Sequence[str]) -> Iterator[str]:
    """Characters in order as the ranges of a class."""
    first = 0
    for place in range(1, len(characters) + 1):
        if place == len(characters) or ord(characters[place]) != ord(characters[place - 1]) + 1:
            yield f"{re.escape(characters[first])}-{re.escape(characters[place - 1])}"
            first = place
