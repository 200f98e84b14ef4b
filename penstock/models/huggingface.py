"""Weights in and out of folders in the Hugging Face layout.

`api` loads `model.from` and `convert` writes with it. It must never know about families' names
or files' formats: `models/families` and `models/weight_files.py` do.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from penstock.errors import CheckpointError
from penstock.files import atomic_write, replacing
from penstock.models.adapter import held_base
from penstock.models.architecture import Architecture
from penstock.models.families import FAMILIES, hf_config
from penstock.models.frozen_base import HeldLinear, make_held
from penstock.models.initialization import every, unfilled
from penstock.models.stored import Stored
from penstock.models.transformer import Transformer
from penstock.models.weight_files import SAFE_NAME, WeightFiles

_VOCABULARY = ("embed.tokens.weight", "head.projection.weight", "head.projection.bias")
"""Parameters whose rows are the vocabulary, padded here and not there."""

_SHOWN = 4
"""Names of each kind of misfit that an error lists."""

_OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""How files made before 2019 end the names of norms."""


def load_model(
    folder: Path,
    architecture: Architecture,
    device: str,
    dtype: torch.dtype,
    holds: Callable[[str], bool] = every,
) -> Transformer:
    """A model with the weights of FOLDER: each goes from its file straight to its place, so that
    the most memory in use is little over the weights' own, also where adapters have them held in
    few bits. What it does not hold, by name, is not read.

    Raises:
        CheckpointError: as `load_weights`.
    """
    model = unfilled(architecture, device, dtype, holds)
    base = held_base(architecture.adapter)
    held = {} if base is None else make_held(model, base)
    load_weights(folder, model, held)
    return model


@torch.no_grad()
def load_weights(
    folder: Path, model: Transformer, held: Mapping[str, HeldLinear] | None = None
) -> None:
    """Fill `model` from FOLDER/model.safetensors or pytorch_model.bin, sharded or not; `held`: the
    layers whose weights, by name, are packed as they come.

    One tensor at a time is read from safetensors, so that no second copy of the weights exists.

    Raises:
        CheckpointError: no weights, damaged files, or tensors missing, left over or misshapen.
    """
    architecture = model.architecture
    family = FAMILIES[architecture.family]
    files = WeightFiles(folder)
    stored = {_full_name(name, family.PREFIX, family.RENAMED): name for name in files.names()}
    held = held or {}
    own = dict(model.named_parameters())
    elsewhere = {name for name, parameter in own.items() if parameter.is_meta}
    elsewhere |= {name for name, layer in held.items() if layer.is_elsewhere}
    places = family.hf_names(architecture)
    targets = {
        ours: own[ours][: architecture.vocab_size] if ours in _VOCABULARY else own[ours]
        for ours in places
        if ours not in held
    }
    wanted: dict[str, list[int]] = {}
    for ours, place in places.items():
        layer = held.get(ours)
        shape = (
            targets[ours].shape
            if layer is None
            else torch.Size((layer.out_features, layer.in_features))
        )
        shapes = _stored_shapes(place, shape)
        wanted |= dict(zip(place.names, shapes, strict=True))
    _require_fit(folder, files, stored, wanted, architecture)
    for ours, place in places.items():
        if ours in elsewhere:
            continue
        parts = [files.read(stored[name]) for name in place.names]
        if ours in held:
            held[ours].fill(from_stored(place, parts))
        else:
            targets[ours].copy_(from_stored(place, parts))
    for name in _VOCABULARY:
        if name in own:
            own[name][architecture.vocab_size :] = 0


def save_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    tokenizer: str | None,
    end_of_text: int | None,
    begin: int | None = None,
    special_tokens: Mapping[str, str] | None = None,
) -> None:
    """Write config.json, model.safetensors and the tokenizer, as `transformers` loads them.

    weights: float32 tensors by our parameter names; tokenizer: the text of tokenizer.json;
    special_tokens: the text of its special tokens by their role, such as eos_token.
    """
    family = FAMILIES[architecture.family]
    tensors: dict[str, Tensor] = {}
    for ours, place in family.hf_names(architecture).items():
        rows = architecture.vocab_size if ours in _VOCABULARY else None
        parts = to_stored(place, weights[ours][:rows])
        tensors |= {name: part.contiguous().clone() for name, part in parts.items()}
    with replacing(folder / SAFE_NAME) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    config = hf_config(architecture, end_of_text, begin)
    if architecture.is_causal:
        first = end_of_text if begin is None else begin
        generation = {"bos_token_id": first, "eos_token_id": end_of_text}
        atomic_write(folder / "generation_config.json", json.dumps(generation, indent=2))
    if tokenizer is not None:
        atomic_write(folder / "tokenizer.json", tokenizer)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": architecture.max_positions,
            **(special_tokens or {}),
        }
        atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
    atomic_write(folder / "config.json", json.dumps(config, indent=2))


def from_stored(place: Stored, parts: list[Tensor]) -> Tensor:
    """One of our parameters from its parts in a checkpoint."""
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    if place.heads is not None:
        tensor = tensor.unflatten(0, (place.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return tensor.t() if place.transposed else tensor


def to_stored(place: Stored, tensor: Tensor) -> dict[str, Tensor]:
    """The parts of one of our parameters, or of its gradient, by their names in a checkpoint."""
    tensor = tensor.t() if place.transposed else tensor
    if place.heads is not None:
        tensor = tensor.unflatten(0, (3, place.heads, -1)).transpose(0, 1).flatten(0, 2)
    parts = tensor.split(list(place.rows)) if place.rows else [tensor]
    return dict(zip(place.names, parts, strict=True))


def _stored_shapes(place: Stored, ours: torch.Size) -> list[list[int]]:
    """What shape each part must have."""
    shape = list(reversed(ours)) if place.transposed else list(ours)
    return [[rows, *shape[1:]] for rows in place.rows] or [shape]


def _require_fit(
    folder: Path,
    files: WeightFiles,
    stored: Mapping[str, str],
    wanted: Mapping[str, list[int]],
    architecture: Architecture,
) -> None:
    """Refuse files whose tensors are not exactly the wanted ones; all of them are listed.

    stored: the tensors' names in the files, by their full ones; wanted: shapes by full names.
    """
    family = FAMILIES[architecture.family]
    untied = family.hf_names(dataclasses.replace(architecture, tie_embeddings=False))
    head = untied["head.projection.weight"].names  # Some files have a tied one twice.
    left = [
        name
        for name in stored
        if name not in wanted
        and not (architecture.tie_embeddings and name in head)
        and not name.endswith(family.IGNORED_SUFFIXES)
    ]
    misshapen = [
        f"{name} has shape {shape}, the model {wanted[name]}"
        for name in wanted
        if name in stored and (shape := files.shape(stored[name])) != wanted[name]
    ]
    missing = [name for name in wanted if name not in stored]
    misfits = [_listed(misshapen)] if misshapen else []
    if missing:
        misfits.append(f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if left:
        misfits.append(
            f"{_listed(left)} {'has' if len(left) == 1 else 'have'} no place in the model"
        )
    if misfits:
        raise _misfit(folder, "; ".join(misfits))


def _listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _full_name(name: str, prefix: str, renamed: Mapping[str, str]) -> str:
    """A stored name as the family knows it: files of the bare model lack the prefix, and norms
    of models made with TensorFlow have other names.
    """
    for old, new in _OLD_NORMS.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    for theirs, ours in renamed.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    known = (prefix, "lm_head.", *renamed.values())
    return name if name.startswith(known) else prefix + name


def _misfit(folder: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"the weights in {folder} do not fit: {how}",
        where="model.from",
        do="use the config.json that belongs to them",
    )
