"""A tensor in equal parts: which elements each part has, and the whole again from all of them.

`models/split_block.py` says which parameters are cut and how; checkpoints put them together by what
is written here. It must never know about processes or files.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Cut:
    """Along one dimension, in sections of which each part has an equal share: of attention's rows
    those for some heads' queries, their keys and their values. A single number, which an optimizer
    keeps of a whole tensor, all parts have.
    """

    dimension: int
    sections: tuple[int, ...]
    """Sizes of the whole tensor's sections, in order."""

    def within(self, start: int, count: int) -> "Cut":
        """That of a tensor which stands beside `count` of the elements from `start` on."""
        end, kept = 0, list[int]()
        for size in self.sections:
            begin, end = end, end + size
            kept.append(min(end, start + count) - max(begin, start))
        return Cut(self.dimension, tuple(size for size in kept if size > 0))

    def own(self, whole: Tensor, part: int, parts: int) -> Tensor:
        """The elements of one part of several, a copy of their own."""
        if whole.ndim == 0:
            return whole
        sections = whole.split(self.sections, self.dimension)
        return torch.cat([s.chunk(parts, self.dimension)[part] for s in sections], self.dimension)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from all its parts, in order.

        Raises:
            ValueError: they do not make it up.
        """
        if all(part.ndim == 0 for part in parts):
            return parts[0]
        sizes = [size // len(parts) for size in self.sections]
        if any(part.shape[self.dimension] != sum(sizes) for part in parts):
            raise ValueError("parts of a tensor have not the size they should have")
        cut = [part.split(sizes, self.dimension) for part in parts]
        pieces = [sections[index] for index in range(len(sizes)) for sections in cut]
        return torch.cat(pieces, self.dimension)

    def to_json(self) -> list[Any]:
        """Plain JSON; `from_json` reads it back."""
        return [self.dimension, *self.sections]

    @staticmethod
    def from_json(value: Sequence[int]) -> "Cut":
        """Read what `to_json` wrote; ValueError or TypeError when it is not that."""
        dimension, *sections = (int(number) for number in value)
        if dimension not in (0, 1) or not sections or min(sections) < 1:
            raise ValueError("a tensor's cut is not one")
        return Cut(dimension, tuple(sections))
