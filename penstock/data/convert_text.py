"""The tokenizer a conversion knows of, and columns of raw text turned into token sequences by it.

`convert.py` calls it. It must never train a tokenizer: conversion adds nothing of its own.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from penstock.config.data import TokenizerSection
from penstock.data.formats.isolation import IsolatedReader
from penstock.data.formats.sequence import Reader, TokenSequence
from penstock.data.tokenizer import Tokenizer
from penstock.errors import ConfigError

_BATCH_TEXTS = 256
_TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a dataset, as far as it is known."""

    tokenizer: Tokenizer | None

    @property
    def size(self) -> int | None:
        """Tokens, or None."""
        return None if self.tokenizer is None else self.tokenizer.vocab_size

    @property
    def padding(self) -> int | None:
        """End-of-text, which rows are padded with; or None."""
        return None if self.tokenizer is None else self.tokenizer.end_of_text


def find_vocabulary(source: Path, section: TokenizerSection) -> Vocabulary:
    """The tokenizer the user names, or the one that lies beside the data."""
    if section.from_ is not None:
        return Vocabulary(Tokenizer.load(section.from_))
    folder = source if source.is_dir() else source.parent
    for place in (folder / _TOKENIZER, folder / "tokenizer" / _TOKENIZER):
        if place.is_file():
            return Vocabulary(Tokenizer.load(place))
    return Vocabulary(None)


def tokenized(reader: Reader, vocabulary: Vocabulary) -> Reader:
    """The reader itself, or its text tokenized where it has no token ids.

    Raises:
        ConfigError: text, and no tokenizer.
    """
    if not isinstance(reader, IsolatedReader) or not reader.is_text:
        return reader
    if vocabulary.tokenizer is None:
        raise ConfigError(
            "the source is text, no token ids",
            where="tokenizer.from",
            do="set tokenizer.from=FOLDER",
        )
    return _Tokenized(reader, vocabulary.tokenizer)


class _Tokenized:
    """Texts as sequences: the tokens of each, and end-of-text."""

    def __init__(self, source: IsolatedReader, tokenizer: Tokenizer) -> None:
        self._source, self._tokenizer = source, tokenizer
        self.facts = dataclasses.replace(
            source.facts, dtype="int32", vocab_size=tokenizer.vocab_size
        )

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield one sequence a text."""
        texts = self._source.texts()
        while batch := list(itertools.islice(texts, _BATCH_TEXTS)):
            for ids in self._tokenizer.encode_batch(batch):
                yield TokenSequence(np.append(ids, np.int32(self._tokenizer.end_of_text)))
