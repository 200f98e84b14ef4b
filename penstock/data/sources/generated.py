"""Text that nobody wrote: random words, to measure speed where there is no data.

`data/sources` offers it as kind=generated, as Graphcore's `--train-path generated` and other
systems' synthetic data do. It must never read a file.

Source: ours. Every document is a pure function of its number.
"""

import functools
from collections.abc import Iterator

import numpy as np

from penstock.config.data import SourceSection
from penstock.data.sources.files import SourceFile
from penstock.data.sources.piece import Piece, Tally

_DOCUMENTS, _WORDS = 512, 500
"""Documents, and words of each: 1.7 MB in all, gone through again and again."""
_VOCABULARY, _LONGEST_WORD = 4096, 9
_BYTES_OF_A_WORD = 6.5
"""On average, with its space: what progress is told in."""


def list_generated() -> list[SourceFile]:
    """The documents there are, as files that lie nowhere."""
    names = [f"generated/{number:04}" for number in range(_DOCUMENTS)]
    return [SourceFile(name, name, int(_WORDS * _BYTES_OF_A_WORD), 0) for name in names]


def read_generated(file: SourceFile, section: SourceSection, tally: Tally) -> Iterator[Piece]:
    """One document."""
    words = _words()
    number = int(file.id.rpartition("/")[2])
    chosen = np.random.default_rng(number).integers(0, len(words), _WORDS)
    yield Piece(file.id, " ".join(words[index] for index in chosen), ends=True)


@functools.cache
def _words() -> list[str]:
    """Words of random letters."""
    generator = np.random.default_rng(_VOCABULARY)
    lengths = generator.integers(2, _LONGEST_WORD + 1, _VOCABULARY)
    letters = generator.integers(ord("a"), ord("z") + 1, (_VOCABULARY, _LONGEST_WORD), np.uint8)
    return [row[:n].tobytes().decode() for row, n in zip(letters, lengths, strict=True)]
