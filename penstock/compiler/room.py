"""Memory for the logits of one piece, kept from one call of the head's kernels to the next.

`compiler/runtime.py` calls the kernels in it. It must never know what they compute.
"""

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor

_BEHIND, _BELOW = 64 << 20, 32 << 20
"""Bytes kept behind the room, and free below it at first: what a call allocates besides goes where
it fits most closely, so not behind its largest tensor, where it might stay."""


class Room:
    """Memory of a CPU in which nothing but a call's largest tensor comes to lie.

    Logits are by far the largest tensor of a step. Between two calls the allocator would put small
    tensors, and objects that stay for good, where they lay; the next ones would not fit in any
    more, and the heap grow by their size, again and again.
    """

    def __init__(self, size: int) -> None:
        """Of `size` bytes; of none, nothing is kept."""
        self._size = size
        self._kept: Tensor | None = None
        self._between: Tensor | None = None

    @contextlib.contextmanager
    def given(self, device: torch.device) -> Generator[None]:
        """Free it inside, for calls on that device, and take it again."""
        if not self._size or device.type != "cpu":
            yield
            return
        if self._kept is None:
            below = _bytes(_BELOW)
            self._between = _bytes(1)
            self._kept = _bytes(self._size + _BEHIND)
            del below
        self._kept = None
        yield
        self._kept = _bytes(self._size + _BEHIND)


def _bytes(count: int) -> Tensor:
    """Memory that is not written to, hence not resident."""
    return torch.empty(count, dtype=torch.uint8)
