"""Low-rank adapters in and out of folders in PEFT's format.

Format: adapter_config.json and adapter_model.safetensors as `peft` 0.21 writes them, with
"base_model.model.PATH.lora_A.weight" (rank, in) and "….lora_B.weight" (out, rank) of each module.
`jobs.py` starts from such a folder, `convert adapter` writes one. It must never know the rest of
a model's weights.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from penstock.errors import CheckpointError
from penstock.files import atomic_write, replacing
from penstock.models.adapter import Site
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES
from penstock.models.huggingface import from_stored, to_stored
from penstock.models.lora import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    peft_config,
    peft_paths,
    tensor_names,
)
from penstock.models.stored import Stored


def read_adapter(folder: Path, architecture: Architecture) -> dict[str, Tensor]:
    """An adapter's tensors, float32, by our parameter names.

    Raises:
        CheckpointError: tensors missing, left over, or of another shape.
    """
    left = set(tensor_names(folder))
    adapter = architecture.adapter
    rank = 0 if adapter is None else adapter.rank
    found: dict[str, Tensor] = {}
    with safetensors.safe_open(folder / PEFT_WEIGHTS, "pt") as file:
        for ours, name, site in _names(architecture):
            shape = [rank, site.columns] if ours.endswith("down") else [site.rows, rank]
            if name not in left:
                raise _misfit(folder, f"{name} is missing")
            tensor = file.get_tensor(name).to(torch.float32)
            if list(tensor.shape) != shape:
                raise _misfit(folder, f"{name} has shape {list(tensor.shape)}, not {shape}")
            left.remove(name)
            found[ours] = from_stored(_rows(architecture, ours, site), [tensor]).contiguous()
    if left:
        raise _misfit(folder, f"{min(left)} has no place in the model")
    return found


def write_adapter(
    folder: Path, weights: Mapping[str, Tensor], architecture: Architecture, base: str | None
) -> None:
    """Write a folder that `peft` loads; weights: float32 adapters by our parameter names; base: the
    folder or hub name of the model they stand on.
    """
    tensors: dict[str, Tensor] = {}
    for ours, name, site in _names(architecture):
        (tensor,) = to_stored(_rows(architecture, ours, site), weights[ours]).values()
        tensors[name] = tensor.contiguous().clone()
    with replacing(folder / PEFT_WEIGHTS) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    atomic_write(folder / PEFT_CONFIG, json.dumps(peft_config(architecture, base), indent=2))


def _names(architecture: Architecture) -> Iterator[tuple[str, str, Site]]:
    """Our name, PEFT's name and the site of every tensor."""
    for layer, site, path in peft_paths(architecture):
        ours = f"blocks.{layer}.{site.linear}.adapters.{site.key}"
        for mine, theirs in (("down", "lora_A"), ("up", "lora_B")):
            yield f"{ours}.{mine}", f"base_model.model.{path}.{theirs}.weight", site


def _rows(architecture: Architecture, ours: str, site: Site) -> Stored:
    """How the rows of a matrix B lie there: as the rows of the layer it stands beside."""
    if ours.endswith("down"):
        return Stored.as_is(ours)
    names = FAMILIES[architecture.family].hf_names(architecture)
    return Stored((ours,), heads=names[f"blocks.0.{site.linear}.weight"].heads)


def _misfit(folder: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter in {folder} does not fit: {how}",
        where="lora.from",
        do="give the adapter and the model.from it was trained on",
    )
