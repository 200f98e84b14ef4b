"""Which kernels text generation runs, by name and shape.

The compiler makes them, `inference/compiled.py` calls them. It must never import torch.
"""

import dataclasses

_CHUNK = 32
"""Prompt positions per pass: enough that reading the weights does not dominate."""
_SHORT = 256
"""Cached positions of the cheaper kernels that run while the text is still short."""


@dataclasses.dataclass(frozen=True)
class GenerationShapes:
    """Static shapes of an executable for generation."""

    capacity: int
    """Cache places, the longest text in tokens."""
    rows: tuple[int, ...]
    """Batch sizes compiled, ascending: one prompt, and the most at once."""

    @staticmethod
    def of(capacity: int, batch: int) -> "GenerationShapes":
        """For texts up to `capacity` tokens and up to `batch` prompts at once."""
        return GenerationShapes(capacity, tuple(sorted({1, batch})))

    @property
    def chunk(self) -> int:
        """Prompt positions per prefill pass."""
        return min(_CHUNK, self.capacity)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cached positions that kernels read, ascending."""
        return tuple(sorted({min(_SHORT, self.capacity), self.capacity}))

    def length_for(self, cached: int) -> int:
        """The shortest of `lengths` that holds so many."""
        return next(length for length in self.lengths if length >= cached)

    def kernels(self) -> dict[str, tuple[int, int, int]]:
        """Name → (rows, new positions, cached positions) of every kernel; logits have no cache."""
        found: dict[str, tuple[int, int, int]] = {}
        for rows in self.rows:
            for length in self.lengths:
                found[prefill_kernel(rows, length)] = (rows, self.chunk, length)
                found[decode_kernel(rows, length)] = (rows, 1, length)
            found[logits_kernel(rows)] = (rows, 1, 0)
        return found


def prefill_kernel(rows: int, length: int) -> str:
    """A block over a chunk of the prompts after at most `length` cached positions."""
    return f"block_prefill_{rows}x{length}"


def decode_kernel(rows: int, length: int) -> str:
    """A block over one new position after at most `length` cached ones."""
    return f"block_decode_{rows}x{length}"


def logits_kernel(rows: int) -> str:
    """The head without a loss."""
    return f"head_logits_{rows}"
