"""Megatron's indexed pairs as sequences with loss weights, the weights in a second pair beside.

`registry.py` hands it prefixes to read and splits to write; the layout itself is `megatron.py`'s.
It must never know what the numbers mean.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from penstock.data.formats import megatron
from penstock.data.formats.sequence import Facts, Layout, TokenSequence, damaged, weights_or_none

WEIGHTS_SUFFIX = "_loss_weights"
"""PREFIX_loss_weights.bin/.idx holds a float32 for each token, where not all weigh 1."""


class Reader:
    """One pair of files, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Open the pair by its prefix, or by either file.

        Raises:
            DataError: missing, damaged or contradicting files, or elements that are no integers.
        """
        self._path = path
        prefix = path.with_suffix("") if path.suffix in (".idx", ".bin") else path
        self._inner = megatron.Reader(prefix)
        dtype = self._inner.tokens.dtype
        if dtype.kind not in "ui":
            raise damaged(path, f"holds {dtype}, which are no token ids")
        weights = prefix.with_name(prefix.name + WEIGHTS_SUFFIX)
        self._weights = megatron.Reader(weights) if weights.with_suffix(".idx").exists() else None
        if self._weights is not None and (
            self._weights.tokens.dtype != np.float32
            or not np.array_equal(self._weights.lengths, self._inner.lengths)
            or not np.array_equal(self._weights.starts, self._inner.starts)
        ):
            raise damaged(weights, f"does not match {prefix.name}")
        self.facts = Facts(len(self._inner.lengths), len(self._inner.tokens), str(dtype))

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield each sequence as a view of the mapped file."""
        for index in range(len(self._inner.lengths)):
            yield self.at(index)

    def at(self, index: int) -> TokenSequence:
        """One sequence as a view of the mapped file."""
        inner, weights = self._inner, self._weights
        start = int(inner.starts[index])
        part = slice(start, start + int(inner.lengths[index]))
        return TokenSequence(
            inner.tokens[part],
            None if weights is None else weights_or_none(weights.tokens[part]),
        )


class Writer:
    """SPLIT.bin and SPLIT.idx, and the weights' pair where a sequence has weights."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        """The dtype follows the vocabulary, or the largest id where that is not known."""
        self._prefix = folder / split
        self._weights_prefix = folder / (split + WEIGHTS_SUFFIX)
        vocab_size = layout.vocab_size or layout.largest + 1
        self._tokens = megatron.Writer(self._prefix, megatron.token_dtype(vocab_size))
        self._weights = megatron.Writer(self._weights_prefix, np.dtype(np.float32))
        self._weighted = False

    def append(self, sequence: TokenSequence) -> None:
        """Add one sequence."""
        self._tokens.append(sequence.tokens)
        self._weights.append(sequence.loss_weights())
        self._weighted = self._weighted or sequence.weights is not None

    def finish(self) -> list[Path]:
        """Name the files; weights that are all 1 are not kept."""
        prefixes = [self._prefix]
        if self._weighted:
            self._weights.finish()
            prefixes.append(self._weights_prefix)
        else:
            self._weights.abandon()
        self._tokens.finish()
        return [prefix.with_suffix(kind) for prefix in prefixes for kind in (".bin", ".idx")]

    def abandon(self) -> None:
        """Leave nothing."""
        self._tokens.abandon()
        self._weights.abandon()
