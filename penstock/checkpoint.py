"""Checkpoints: folders that appear whole or not at all, verified by checksum, written aside.

The trainer saves `CheckpointState`s through `saving.AsyncSaver`; everybody loads by
`load_newest`. It must never know what the tensors mean. Only safetensors and JSON are ever read.

Layout of FOLDER/step-00000100/ (ours): model.safetensors with the fp32 weights by parameter name,
optimizer.safetensors with everything else, state.json, and manifest.json with size and SHA-256 of
the others. The manifest is written last; only then does the folder take its name. Where processes
hold parts of the tensors, each writes its rows, stages their own tensors, parts of blocks theirs:
model-00001-of-00002.safetensors and so on.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from penstock.console import get_console
from penstock.errors import CheckpointError
from penstock.files import atomic_write, fsync_file, fsync_folder, sha256_file
from penstock.parallel.part_files import read_tensors, write_tensors
from penstock.parallel.parts import MAKE_ROOM, WHOLE, Part, collect, give_up, in_parts, leave
from penstock.tensors import OnDemand

_WEIGHTS, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_STATE, _MANIFEST = "state.json", "manifest.json"
_FORMAT_VERSION = 1
_MASTER = "master."
_NAME = re.compile(r"step-(\d{8,18})(\.replaced)?")
_REPLACED = ".replaced"
"""Ending of a checkpoint while another of the same step takes its place."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged file may raise."""


class _DamagedError(CheckpointError):
    """The checkpoint is not what was once written."""


@dataclasses.dataclass(frozen=True)
class CheckpointState:
    """Everything needed to go on exactly."""

    step: int
    """Optimizer steps done."""
    tensors: Mapping[str, Tensor]
    """By name, contiguous; "master.NAME" are the float32 weights by parameter name."""
    values: dict[str, Any]
    """Plain JSON values."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; none when there is no such folder."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    order = {path: (int(match[1]), match[2] is None) for match, path in found if match}
    return sorted(order, key=order.__getitem__)


def save_checkpoint(
    folder: Path, state: CheckpointState, *, is_best: bool = False, part: Part = WHOLE
) -> Path:
    """Write one checkpoint, or a process's `part` of it; returns its folder.

    One of the same step is replaced only once the new one is whole; should it hold the same
    weights and be the best, so is the new one.

    Raises:
        CheckpointError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    final = folder / f"step-{state.step:08}"
    temporary = folder / f".{final.name}.{part.token or secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=bool(part.token))
        files = _write_tensors(temporary, state.tensors, part)
        if part.index > 0:
            leave(temporary, part, files)
            return final
        atomic_write(temporary / _STATE, json.dumps({"step": state.step, **state.values}))
        files |= {_STATE: _facts(temporary / _STATE), **collect(temporary, part)}
        before = _manifest_or_none(final)
        if before is not None and before.get("is_best") is True:
            is_best = is_best or _of_weights(before["files"]) == _of_weights(files)
        manifest = {"format_version": _FORMAT_VERSION, "is_best": is_best, "files": files}
        atomic_write(temporary / _MANIFEST, json.dumps(manifest))
        _put_in_place(temporary, final)
    except (OSError, safetensors.SafetensorError) as error:
        _discard(temporary, part)
        if part.index > 0:
            give_up(temporary, part, _reason(error))
        what = f"the checkpoint could not be written: {_reason(error)}"
        raise CheckpointError(what, where=str(folder), do=MAKE_ROOM) from error
    except BaseException:
        _discard(temporary, part)
        raise
    return final


def _discard(temporary: Path, part: Part) -> None:
    """Remove what a failed save has written: a process's own files, or as the first all."""
    if part.index == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        for name in (_WEIGHTS, _OPTIMIZER):
            (temporary / part.file_name(name)).unlink(missing_ok=True)


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], part: Part) -> dict[str, Any]:
    """Write a process's tensors; size and SHA-256 of each file, by its name."""
    files: dict[str, Any] = {}
    for name, content in _divided(tensors).items():
        path = folder / part.file_name(name)
        write_tensors(path, content, part)
        fsync_file(path)
        files[path.name] = _facts(path)
    return files


def _facts(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _of_weights(files: dict[str, Any]) -> list[Any]:
    """Size and SHA-256 of the files with the weights."""
    return [files[name] for name in in_parts(files, _WEIGHTS)]


def _divided(tensors: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of each file, by their names there; weights one at a time, since an optimizer
    may have to make them.
    """
    weights = [name.removeprefix(_MASTER) for name in tensors if name.startswith(_MASTER)]
    others = {name: tensors[name] for name in tensors if not name.startswith(_MASTER)}
    named = OnDemand.chosen(weights, tensors, lambda name: _MASTER + name)
    return {_WEIGHTS: named, _OPTIMIZER: others}


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name; at every moment there is a whole one of its step."""
    aside = final.with_name(final.name + _REPLACED)
    if final.exists():
        remove_checkpoint(aside)
        final.rename(aside)
    temporary.rename(final)
    fsync_folder(final.parent)
    fsync_folder(final.parent.parent)
    remove_checkpoint(aside)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that it is never half there; what cannot be deleted stays."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _reason(error: Exception) -> str:
    """Why a write failed, in a few words."""
    code = getattr(error, "errno", None)
    # safetensors puts the system's error into its text: "I/O error: … (os error 28)".
    in_text = re.search(r"os error (\d+)", str(error))
    code = int(in_text[1]) if code is None and in_text else code
    if code in _FULL:
        return "the disk is full"
    return str(error) if code is None else os.strerror(code)


def load_checkpoint(
    path: Path,
    *,
    verify: bool = True,
    weights_only: bool = False,
    wanted: Callable[[str], bool] | None = None,
) -> CheckpointState:
    """Read one checkpoint; tensors are on the CPU.

    Args:
        path: the checkpoint's folder.
        verify: compare SHA-256 sums, not only sizes, before anything is used.
        weights_only: leave out the optimizer's tensors; only the float32 "master.NAME" are read.
        wanted: of the tensors, by NAME or KIND.NAME, which to read; all when not given.

    Raises:
        CheckpointError: missing, truncated, changed, or of another format version.
    """
    try:
        files = _read_manifest(path)["files"]
        kinds = (_WEIGHTS,) if weights_only else (_WEIGHTS, _OPTIMIZER)
        names = {kind: in_parts(files, kind) for kind in kinds}
        for name in [*itertools.chain(*names.values()), _STATE]:
            if (path / name).stat().st_size != files[name]["bytes"]:
                raise _damaged(path, f"{name} is truncated")
            if verify and sha256_file(path / name) != files[name]["sha256"]:
                raise _damaged(path, f"{name} has changed")
        values = json.loads((path / _STATE).read_bytes())
        weights = read_tensors([path / name for name in names[_WEIGHTS]], wanted)
        tensors = {_MASTER + name: tensor for name, tensor in weights.items()}
        if not weights_only:
            tensors |= read_tensors([path / name for name in names[_OPTIMIZER]], wanted)
        return CheckpointState(int(values.pop("step")), tensors, values)
    except PermissionError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", where=str(path), do="mind its permissions"
        ) from None
    except (*_DAMAGE, safetensors.SafetensorError) as error:
        raise _damaged(path, str(error) or repr(error)) from None


def _damaged(path: Path, how: str) -> _DamagedError:
    return _DamagedError(f"{path} is damaged: {how}", where=str(path), do="use another checkpoint")


def _read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, of the version this program knows."""
    manifest = json.loads((path / _MANIFEST).read_bytes())
    if manifest["format_version"] != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest['format_version']}, not {_FORMAT_VERSION}",
            where=str(path),
            do="use the version of Penstock it was written with",
        )
    return manifest


def _manifest_or_none(path: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest, where there is one to read.

    Raises:
        OSError: there is one, and it cannot be read now.
    """
    try:
        manifest = _read_manifest(path)
        return manifest if in_parts(manifest["files"], _WEIGHTS) else None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise
    except (*_DAMAGE, CheckpointError):
        return None


def load_newest(
    folder: Path, *, weights_only: bool = False, wanted: Callable[[str], bool] | None = None
) -> CheckpointState | None:
    """The newest checkpoint that is whole, of it what `load_checkpoint` reads; damaged newer ones
    are passed over, and it says so.

    Raises:
        CheckpointError: none is whole, or the newest is not for this user or version to read.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path, weights_only=weights_only, wanted=wanted)
        except _DamagedError as error:
            get_console().warning(f"{error.what}; using the checkpoint before it")
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints is whole",
            where=str(folder),
            do="restore one from a copy, or start a new run folder",
        )
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None when none was ever the best.

    Each best is better than all before it, so it is the newest of them.
    """
    for path in reversed(list_checkpoints(folder)):
        manifest = _manifest_or_none(path)
        if manifest is not None and manifest.get("is_best") is True:
            return path
    return None
