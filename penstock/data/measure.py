"""What a reader's sequences are like: counts, lengths, and what a format must hold to keep them.

`convert.py` measures before it writes, so that headers can state counts, what will be lost is
known, and a damaged file is found before anything is written. It must never write.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from penstock.data.formats.sequence import (
    COMPLETION,
    LARGEST_ID,
    PADDING,
    SEPARATOR,
    TokenSequence,
    check_sequence,
    implied_roles,
)

_CATEGORIES = 1 << 16
"""Numbers of categories that are told apart."""
_BLOCK = 1 << 20
"""Tokens looked at at a time: a sequence can be a whole memory-mapped file."""


@dataclasses.dataclass
class Measure:
    """Counts and properties of all sequences of a split."""

    sequences: int = 0
    tokens: int = 0
    longest: int = 0
    shortest: int = LARGEST_ID
    largest: int = 0
    """Largest token id."""
    empty: int = 0
    """Sequences without tokens."""
    weighted: bool = False
    """Some token weighs other than 1."""
    fractional: bool = False
    """Some weight is neither 0 nor 1, or other than its role says."""
    first_alone: bool = False
    """Some first token's weight does not follow from the others'."""
    roles: bool = False
    """Some roles do not follow from the weights."""
    categories: set[int] = dataclasses.field(default_factory=set[int])
    """Numbers of categories, the first of them where there are very many."""
    like_padding: int = 0
    """Sequences whose end cannot be told from padding."""

    def add(self, sequence: TokenSequence, padding: int) -> None:
        """Take one sequence into account; `padding` is the id it may be padded with."""
        length = len(sequence.tokens)
        self.sequences += 1
        self.tokens += length
        self.longest, self.shortest = max(self.longest, length), min(self.shortest, length)
        if not length:
            self.empty += 1
            return
        for first in range(0, length, _BLOCK):
            block = sequence.tokens[first : first + _BLOCK]
            self.largest = max(self.largest, int(block.max()))
        weights, roles = sequence.weights, sequence.roles
        if sequence.categories is not None and len(self.categories) < _CATEGORIES:
            self.categories |= {n for n in map(int, np.unique(sequence.categories)) if n != -1}
        if roles is not None:
            self.roles |= bool((roles != implied_roles(sequence, padding)).any())
            implied = (roles == COMPLETION) | (roles == SEPARATOR)
            self.fractional |= bool((sequence.loss_weights() != implied).any())
            self.like_padding += int(roles[-1] == PADDING)
        if weights is not None:
            self.weighted = True
            self.fractional |= bool(((weights != 0) & (weights != 1)).any())
            self.first_alone |= bool(weights[0] != (weights[1:] != 0).all())
            if roles is None or roles[-1] != PADDING:
                self.like_padding += int(weights[-1] == 0 and int(sequence.tokens[-1]) == padding)

    @property
    def equal(self) -> bool:
        """Whether all sequences have one length."""
        return self.longest == self.shortest


def measure(
    sequences: Iterable[TokenSequence], where: str, padding: int, largest: int = LARGEST_ID
) -> Measure:
    """Measure, and check each sequence meanwhile.

    Raises:
        DataError: ids beyond `largest`, weights that are none, or a damaged file.
    """
    found = Measure()
    for sequence in sequences:
        check_sequence(sequence, where, largest)
        found.add(sequence, padding)
    return found
