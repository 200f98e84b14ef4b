"""The tensor files of a checkpoint's parts: written by each process, put together when read.

`checkpoint.py` calls it. A file of a process that holds parts of blocks says in its header (the
metadata of safetensors) which part, and how each tensor is cut; all else is in rows. It must never
know what tensors mean.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy.ctypeslib  # noqa: F401 # pyright: ignore[reportUnusedImport] - safetensors loads it at the first save, where there may be no descriptor left
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from penstock.models.cut import Cut
from penstock.parallel.parts import Part
from penstock.tensors import OnDemand, write_float32

_BLOCKS, _CUTS = "blocks", "cuts"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], part: Part) -> None:
    """Write one file, of tensors made on demand (float32) one after the other.

    Raises:
        SafetensorError, OSError: it cannot be written.
    """
    cuts = {name: _cut(part.cuts, name) for name in tensors}
    named = {name: list(cut) for name, cut in cuts.items() if cut is not None}
    about = {_BLOCKS: str(part.blocks), _CUTS: json.dumps(named)} if part.cuts else None
    if isinstance(tensors, OnDemand):
        write_float32(path, tensors, about)
    else:
        safetensors.torch.save_file(dict(tensors), path, about)


def _cut(cuts: Mapping[str, Sequence[int]], name: str) -> Sequence[int] | None:
    """Of a tensor named by a parameter or KIND.PARAMETER."""
    return cuts.get(name) or cuts.get(name.partition(".")[2])


def read_tensors(
    paths: Sequence[Path], wanted: Callable[[str], bool] | None = None
) -> dict[str, Tensor]:
    """The wanted tensors, or all, of one file, or of several: each holds some rows of a tensor, its
    part of a block that is divided, or other tensors than the others.

    Raises:
        ValueError: the files do not make up whole tensors.
        SafetensorError: a file is damaged.
    """
    if len(paths) == 1 and wanted is None:
        return safetensors.torch.load_file(paths[0])
    # Of each tensor, by part of its block, rows in order.
    found: dict[str, dict[int, list[Tensor]]] = {}
    cuts: dict[str, Cut] = {}
    for path in paths:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            named = json.loads(about.get(_CUTS, "{}"))
            cuts |= {name: Cut.from_json(value) for name, value in named.items()}
            part = int(about.get(_BLOCKS, 0))
            for name in file.keys() if wanted is None else filter(wanted, file.keys()):
                rows = found.setdefault(name, {}).setdefault(part if name in named else 0, [])
                rows.append(file.get_tensor(name))
    return {name: _whole(parts, cuts.get(name)) for name, parts in found.items()}


def _whole(parts: Mapping[int, Sequence[Tensor]], cut: Cut | None) -> Tensor:
    if sorted(parts) != list(range(len(parts))):
        raise ValueError("not all parts of a tensor are there")
    put = [torch.cat(list(rows)) if len(rows) > 1 else rows[0] for _, rows in sorted(parts.items())]
    return put[0] if cut is None else cut.joined(put)
