"""The documents of all shards of one split, in order, each to be had by its number.

`data/merge.py` takes them from here. It must never read text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.data.formats.megatron import Reader
from penstock.data.formats.sequence import COMPLETION, SEPARATOR, TokenSequence
from penstock.data.tokenize import CATEGORIES, ROLES, Shard


class Documents:
    """Token sequences with roles, memory-mapped; 12 bytes of memory for each."""

    def __init__(
        self, shards: Sequence[Shard], split: str, *, prompted: bool, categorized: bool = False
    ) -> None:
        """Open every shard; without `prompted` every document is a completion."""

        def opened(name: str) -> list[Reader]:
            return [Reader(Path(shard.folder) / name) for shard in shards]

        self._tokens = opened(split)
        self._roles = opened(split + ROLES) if prompted else None
        self._categories = opened(split + CATEGORIES) if categorized else None
        counts = [len(reader.lengths) for reader in self._tokens]
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self._place = np.concatenate(
            [np.empty(0, np.int64), *(np.arange(count) for count in counts)]
        )
        # A sequence at the end of a shard may go on in the next one: those are one document.
        begins = np.ones(len(self._shard), bool)
        total = 0
        for shard, count in zip(shards, counts, strict=True):
            total += count
            if count and shard.open_split == split and total < len(begins):
                begins[total] = False
        self._first = np.flatnonzero(begins)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self._first)

    def __getitem__(self, number: int) -> TokenSequence:
        """One document with its roles."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = int(self._first[number])
        last = int(self._first[number + 1]) if number + 1 < len(self) else len(self._shard)
        tokens = self._between(self._tokens, first, last)
        if self._roles is not None:
            roles = self._between(self._roles, first, last)
        else:
            roles = np.full(len(tokens), COMPLETION, np.uint8)
            roles[-1:] = SEPARATOR
        kinds = self._categories
        categories = None if kinds is None else self._between(kinds, first, last)
        return TokenSequence(tokens, None, roles, categories)

    def _between(self, readers: Sequence[Reader], first: int, last: int) -> NDArray[Any]:
        """What readers hold of the sequences from `first` up to `last`."""
        parts = [
            _sequence(readers, int(self._shard[number]), int(self._place[number]))
            for number in range(first, last)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Chained:
    """Several splits' documents, one split after another."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        """Take them as they are."""
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        """How many documents there are."""
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> TokenSequence:
        """One document."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[part - 1]) if part else 0
        return self._parts[part][number - before]


def _sequence(readers: Sequence[Reader], shard: int, place: int) -> NDArray[Any]:
    reader = readers[shard]
    start = int(reader.starts[place])
    return reader.tokens[start : start + int(reader.lengths[place])]
