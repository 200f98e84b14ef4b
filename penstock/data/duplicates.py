"""Which documents are equal, or nearly equal, to earlier ones.

`data/merge.py` asks before it writes. The answer depends on the documents and their order alone,
never on workers or shards. Equal: the same tokens. Nearly equal: MinHash signatures of five-token
sequences, grouped by bands (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, §3.4; parameters near those of Lee et al., arXiv 2107.06499). It must never read text.
"""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.data.formats.sequence import TokenSequence

_SHINGLE = 5
_HASHES = 128
_LONGEST = 1 << 20
"""Tokens of a document that near duplicates are looked for by."""
_BLOCK = 1 << 12
"""Shingles hashed at a time, so that all hashes of them stay in the cache."""
_MULTIPLIERS = np.random.default_rng(20_250_101).integers(
    1, 2**64, (2, _HASHES), np.uint64, endpoint=False
)
"""Of a multiply-shift hash each (Dietzfelbinger et al. 1997): odd factors, and what is added."""


class Documents(Protocol):
    """Documents by number."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, number: int) -> TokenSequence:
        """One of them."""
        ...


def exact_duplicates(documents: Documents) -> NDArray[np.bool_]:
    """For each document whether an earlier one has the same tokens; 16 bytes of memory for each."""
    digests = np.empty(len(documents), "V16")
    for number in range(len(documents)):
        tokens = np.ascontiguousarray(documents[number].tokens, np.int32)
        digests[number] = np.void(hashlib.blake2b(tokens.data, digest_size=16).digest())
    order = np.argsort(digests, kind="stable")
    same = np.zeros(len(digests), bool)
    same[1:] = digests[order[1:]] == digests[order[:-1]]
    found = np.zeros(len(digests), bool)
    found[order] = same
    return found


def near_duplicates(documents: Documents, threshold: float, folder: Path) -> NDArray[np.bool_]:
    """For each document whether it is like an earlier one of its group.

    Groups are documents that are alike in a chain; the first of each is kept. Signatures lie in
    `folder`, 512 bytes a document; memory is some 40 bytes a document.
    """
    count = len(documents)
    if count < 2:
        return np.zeros(count, bool)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "signatures.npy"
    signatures = np.lib.format.open_memmap(path, "w+", np.uint32, (count, _HASHES))
    for number in range(count):
        signatures[number] = signature(documents[number].tokens)
    roots = np.arange(count)
    rows = _rows_per_band(threshold)
    for first in range(0, _HASHES - rows + 1, rows):
        band = np.ascontiguousarray(signatures[:, first : first + rows])
        keys = band.view(f"V{4 * rows}").ravel()
        order = np.argsort(keys, kind="stable")
        borders = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
        starts = np.concatenate([[0], borders])
        sizes = np.diff(np.concatenate([starts, [count]]))
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            _link(signatures, order[start : start + size], threshold, roots)
    path.unlink()
    return np.array([_root(roots, number) != number for number in range(count)])


def signature(tokens: NDArray[np.generic]) -> NDArray[np.uint32]:
    """The MinHash signature of a document, (128,): documents are alike as many places are equal."""
    values = np.asarray(tokens[:_LONGEST], np.uint64)
    width = min(_SHINGLE, max(1, len(values)))
    shingles = np.zeros(max(0, len(values) - width + 1), np.uint64)
    for place in range(width):
        shingles *= np.uint64(0x9E3779B97F4A7C15)
        shingles ^= values[place : place + len(shingles)] + np.uint64(1)
        shingles ^= shingles >> np.uint64(29)
    shingles = np.unique(shingles)
    factors, added = _MULTIPLIERS[0] | np.uint64(1), _MULTIPLIERS[1]
    smallest = np.full(_HASHES, 2**32 - 1, np.uint32)
    for first in range(0, len(shingles), _BLOCK):
        block = shingles[first : first + _BLOCK, None]
        hashes = ((block * factors + added) >> np.uint64(32)).astype(np.uint32)
        np.minimum(smallest, hashes.min(axis=0), out=smallest)
    return smallest


def _rows_per_band(threshold: float) -> int:
    """Hashes of a band, as many as still find nine of ten pairs that are just alike enough."""
    fits = [
        rows
        for rows in (1, 2, 4, 8, 16, 32)
        if 1 - (1 - threshold**rows) ** (_HASHES // rows) >= 0.9
    ]
    return max(fits, default=1)


def _link(
    signatures: NDArray[np.uint32],
    members: NDArray[np.int64],
    threshold: float,
    roots: NDArray[np.int64],
) -> None:
    """Join those of a band's bucket that are alike enough to its first ones."""
    # In a bucket of many the first few stand for all: comparing each with each would take squares.
    for place in range(min(len(members) - 1, 8)):
        others = members[place + 1 :]
        alike = (signatures[others] == signatures[members[place]]).mean(axis=1) >= threshold
        for other in others[alike].tolist():
            one, two = _root(roots, int(members[place])), _root(roots, other)
            roots[max(one, two)] = min(one, two)


def _root(roots: NDArray[np.int64], number: int) -> int:
    """The first document of a group."""
    while roots[number] != number:
        roots[number] = roots[roots[number]]
        number = int(roots[number])
    return number
