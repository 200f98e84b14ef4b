"""The tensors in a folder's files of weights, read one at a time.

`models/huggingface.py` asks for them by name. Files are safetensors, or the legacy
pytorch_model.bin with weights only; nothing must ever be unpickled into objects.
"""

import contextlib
import pickle
import struct
from collections.abc import Generator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from penstock.errors import CheckpointError
from penstock.files import read_json

SAFE_NAME = "model.safetensors"
_LEGACY_NAME = "pytorch_model.bin"


class WeightFiles:
    """All tensors of a folder by name."""

    def __init__(self, folder: Path) -> None:
        """Find the files and what is in them.

        Raises:
            CheckpointError: no weights, or damaged files.
        """
        self._places: dict[str, Path] = {}
        self._loaded: dict[str, Tensor] = {}
        for path in weight_files(folder):
            with _readable(path):
                if path.suffix == ".safetensors":
                    with safetensors.safe_open(path, "pt") as file:
                        self._places |= dict.fromkeys(file.keys(), path)
                else:
                    self._loaded |= _unpickled(path)

    def names(self) -> list[str]:
        """Of all tensors."""
        return [*self._places, *self._loaded]

    def shape(self, name: str) -> list[int]:
        """One tensor's shape, without its values."""
        if name in self._loaded:
            return list(self._loaded[name].shape)
        path = self._places[name]
        with _readable(path), safetensors.safe_open(path, "pt") as file:
            return list(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor. The file is closed again: pages that were read do not pile up."""
        if name in self._loaded:
            return self._loaded[name]
        path = self._places[name]
        with _readable(path), safetensors.safe_open(path, "pt") as file:
            return file.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The one file of weights, or those its index names."""
    for single in (SAFE_NAME, _LEGACY_NAME):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return [_inside(folder, name) for name in _shards(index)]
        if (folder / single).is_file():
            return [folder / single]
    raise CheckpointError(
        f"{folder} has neither {SAFE_NAME} nor {_LEGACY_NAME}",
        where="model.from",
        do="check the folder",
    )


def _shards(index: Path) -> list[str]:
    """File names in a shard index: {"weight_map": {tensor: file}}."""
    value = read_json(index)
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict):
        raise CheckpointError(
            f"{index} names no files of weights", where="model.from", do="copy it again"
        )
    return sorted({str(name) for name in names.values()})


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder; its name must not lead out of it."""
    if name != Path(name).name:
        raise CheckpointError(
            f"{name} lies outside {folder}", where="model.from", do="do not use it"
        )
    return folder / name


def _unpickled(path: Path) -> dict[str, Tensor]:
    """A legacy file's tensors, by torch's reader that makes nothing else."""
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    found = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    for key, value in found.items():
        if value.layout is not torch.strided:  # Its indices may lie outside of it: CVE-2025-62164.
            raise ValueError(f"{key} is a sparse tensor")
    return found


@contextlib.contextmanager
def _readable(path: Path) -> Generator[None]:
    """Every way a damaged file shows itself, as one line."""
    try:
        yield
    except pickle.UnpicklingError:
        # Torch's own words tell how to run what is in it.
        raise CheckpointError(
            f"{path} is damaged, or holds more than weights",
            where="model.from",
            do="copy it again, or use a folder with model.safetensors",
        ) from None
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        AttributeError,
        struct.error,
        safetensors.SafetensorError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read: {reason}", where="model.from", do="copy it again"
        ) from None
