"""Weights in and out of folders in the Hugging Face layout.

`api` loads `model.from` and `convert` writes with it. Files are safetensors, or the legacy
pytorch_model.bin with weights only; nothing is ever unpickled into objects.
"""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from penstock.errors import CheckpointError
from penstock.files import atomic_write, read_json, replacing
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES
from penstock.models.transformer import Transformer

_SAFE, _LEGACY = "model.safetensors", "pytorch_model.bin"


@torch.no_grad()
def load_weights(folder: Path, model: Transformer) -> None:
    """Fill `model` from FOLDER/model.safetensors or pytorch_model.bin, sharded or not.

    Raises:
        CheckpointError: no weights, damaged files, or tensors missing, left over or misshapen.
    """
    architecture = model.architecture
    family = FAMILIES[architecture.family]
    stored = {_with_prefix(name): tensor for name, tensor in _read(folder).items()}
    own = dict(model.named_parameters())
    for ours, (theirs, transposed) in family.hf_names(architecture).items():
        tensor = stored.pop(theirs, None)
        if tensor is None:
            raise _misfit(folder, f"{theirs} is missing")
        tensor = tensor.t() if transposed else tensor
        target = own[ours]
        if ours in ("embed.tokens.weight", "head.projection.weight"):
            target = target[: architecture.vocab_size]
        if tensor.shape != target.shape:
            raise _misfit(
                folder, f"{theirs} has shape {list(tensor.shape)}, the model {list(target.shape)}"
            )
        target.copy_(tensor)
    tied = {"lm_head.weight"} if architecture.tie_embeddings else set()
    left = [n for n in stored if n not in tied and not n.endswith(family.IGNORED_SUFFIXES)]
    if left:
        raise _misfit(folder, f"{left[0]} has no place in the model")
    model.embed.tokens.weight[architecture.vocab_size :] = 0
    model.head.projection.weight[architecture.vocab_size :] = 0


def save_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    tokenizer: str | None,
    end_of_text: int | None,
) -> None:
    """Write config.json, model.safetensors and the tokenizer, as `transformers` loads them.

    weights: float32 tensors by our parameter names; tokenizer: the text of tokenizer.json.
    """
    family = FAMILIES[architecture.family]
    tensors: dict[str, Tensor] = {}
    for ours, (theirs, transposed) in family.hf_names(architecture).items():
        tensor = weights[ours]
        if ours in ("embed.tokens.weight", "head.projection.weight"):
            tensor = tensor[: architecture.vocab_size]
        tensors[theirs] = (tensor.t() if transposed else tensor).contiguous().clone()
    with replacing(folder / _SAFE) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    config = family.to_hf_config(architecture, end_of_text)
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    atomic_write(folder / "generation_config.json", json.dumps(generation, indent=2))
    if tokenizer is not None:
        atomic_write(folder / "tokenizer.json", tokenizer)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": architecture.max_positions,
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
        }
        atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
    atomic_write(folder / "config.json", json.dumps(config, indent=2))


def _with_prefix(name: str) -> str:
    """Old files lack the "transformer." in front."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    for single in (_SAFE, _LEGACY):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return {k: v for name in _shards(index) for k, v in _read_file(folder, name).items()}
        if (folder / single).is_file():
            return _read_file(folder, single)
    raise CheckpointError(
        f"{folder} has neither {_SAFE} nor {_LEGACY}", where="model.from", do="check the folder"
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


def _read_file(folder: Path, name: str) -> dict[str, Tensor]:
    """One file of tensors; its name must not lead out of the folder."""
    if name != Path(name).name:
        raise CheckpointError(
            f"{name} lies outside {folder}", where="model.from", do="do not use it"
        )
    path = folder / name
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        AttributeError,
        struct.error,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read: {reason}", where="model.from", do="copy it again"
        ) from None


def _misfit(folder: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"the weights in {folder} do not fit: {how}",
        where="model.from",
        do="use the config.json that belongs to them",
    )
