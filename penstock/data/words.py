"""The tokens of words, remembered, for tokenizers that take each word by itself.

`data/tokenizer.py` encodes batches through it where it may. Text repeats few words: cutting it
(`data/word_cuts.py`) and asking the tokenizer for each word once is several times as fast as
handing it the text. It must never know what a document is.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray

from penstock.data.word_cuts import Cut, word_cut

_KEPT = 1 << 18
"""Words whose tokens are remembered: some 50 MB."""
_LONGEST = 64
"""Characters of a word that is worth remembering."""


def encode_each(inner: tokenizers.Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Token ids by the library itself, in parallel where the process allows it."""
    return [e.ids for e in inner.encode_batch_fast(list(texts), add_special_tokens=False)]


class WordEncoder:
    """The tokens of texts by their words, remembered."""

    def __init__(self, cut: Cut, inner: tokenizers.Tokenizer) -> None:
        """`inner` gives the tokens of what `cut` makes of a text."""
        self._cut = cut
        self._inner = inner
        self._known: dict[str, bytes] = {}

    @staticmethod
    def of(inner: tokenizers.Tokenizer) -> "WordEncoder | None":
        """For a tokenizer whose words are known to be independent; None for others.

        Special tokens must not be looked for in the text.
        """
        found = word_cut(inner)
        return None if found is None else WordEncoder(*found)

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text."""
        cut = [self._cut(text) for text in texts]
        # Taken once: another thread may put an empty one in its place.
        known = self._known
        new = [word for word in set(itertools.chain.from_iterable(cut)) if word not in known]
        found = {
            word: np.array(ids, np.int32).tobytes()
            for word, ids in zip(new, encode_each(self._inner, new), strict=True)
        }
        long = {word: found.pop(word) for word in new if len(word) > _LONGEST}
        known.update(found)
        if len(known) > _KEPT:
            self._known = {}
        look_up = known.__getitem__ if not long else {**known, **long}.__getitem__
        return [np.frombuffer(b"".join(map(look_up, words)), np.int32) for words in cut]
