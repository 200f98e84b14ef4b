"""Tensors by name that are made when they are asked for, and a file they go into one by one.

Optimizers give their state so, checkpoints are written from it. It must never know what the
tensors mean, nor import torch.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ENTRY_BYTES = 256
"""Room in a file's header for one tensor of a few dimensions, besides its name."""


class OnDemand(Mapping[str, "Tensor"]):
    """A mapping that holds no tensor: whoever takes one at a time needs the memory of one."""

    def __init__(self, names: Iterable[str], make: Callable[[str], "Tensor"]) -> None:
        """Of these names, in their order; `make` gives a name's tensor."""
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> "Tensor":
        """Make one; KeyError where there is none of that name."""
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)


def write_float32(
    path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write float32 tensors to a safetensors file, holding one of them at a time.

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
            array = tensors[name].detach().cpu().contiguous().numpy()
            start, end = end, end + array.nbytes
            place = {"dtype": "F32", "shape": array.shape, "data_offsets": (start, end)}
            header[name] = place
            file.write(array.reshape(-1).data)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(header).encode().ljust(room))
