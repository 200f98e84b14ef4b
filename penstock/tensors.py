"""Tensors by name that are made when they are asked for, and a file they go into one by one.

Optimizers give their state so, checkpoints are written from it. It must never know what the
tensors mean, nor import torch.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_ENTRY_BYTES = 256
"""Room in a file's header for one tensor of a few dimensions, besides its name."""


class Pieces(NamedTuple):
    """A tensor by parts along its first dimension, one of which is there at a time."""

    shape: tuple[int, ...]
    parts: Iterable["Tensor"]

    @staticmethod
    def of(tensor: "Tensor") -> "Pieces":
        """A tensor as its only part."""
        return Pieces(tuple(tensor.shape), [tensor])


class OnDemand(Mapping[str, "Tensor"]):
    """A mapping that holds no tensor: whoever takes one at a time needs the memory of one, and
    whoever takes it by `in_pieces` that of a part.
    """

    def __init__(
        self,
        names: Iterable[str],
        make: Callable[[str], "Tensor"],
        cut: Callable[[str], Pieces] | None = None,
    ) -> None:
        """Of these names, in their order; `make` gives a name's tensor, `cut` its parts where they
        can be made one by one.
        """
        self._names = dict.fromkeys(names)
        self._make, self.cut = make, cut

    @staticmethod
    def chosen(
        names: Iterable[str],
        tensors: Mapping[str, "Tensor"],
        known: Callable[[str], str] = lambda name: name,
    ) -> "OnDemand":
        """Of another mapping what these names are `known` as there."""
        return OnDemand(
            names,
            lambda name: tensors[known(name)],
            lambda name: in_pieces(tensors, known(name)),
        )

    def __getitem__(self, name: str) -> "Tensor":
        """Make one; KeyError where there is none of that name."""
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is one of that name; the inherited answer would make it."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)


def in_pieces(tensors: Mapping[str, "Tensor"], name: str) -> Pieces:
    """One of the tensors, by parts where it is made from them, else as it is."""
    if isinstance(tensors, OnDemand) and name in tensors and tensors.cut is not None:
        return tensors.cut(name)
    return Pieces.of(tensors[name])


def write_float32(
    path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write float32 tensors to a safetensors file, holding a piece of one of them at a time.

    Format: https://github.com/huggingface/safetensors#format (length of the header in 8 bytes, the
    header in JSON with spaces behind it, the tensors' bytes). safetensors' own function takes all
    tensors at once.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    room = len(json.dumps(header)) + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in tensors)
    room += -room % 8
    end = 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for name in tensors:
            shape, parts = in_pieces(tensors, name)
            start = end
            for part in parts:
                array = part.detach().cpu().contiguous().numpy()
                end += array.nbytes
                file.write(array.reshape(-1).data)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(header).encode().ljust(room))
