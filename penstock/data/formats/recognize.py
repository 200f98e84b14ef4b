"""Which format files have, by their content, and which split each belongs to.

`data/convert.py` and `inspect` ask. A file's format never depends on its name; its split cannot
depend on anything else. It must never read more of a file than its beginning.
"""

import dataclasses
import glob
import re
from collections.abc import Iterable
from pathlib import Path

from penstock.data.formats import (
    arrow,
    arrow_writers,
    cerebras,
    jsonl,
    npy,
    pickled,
    raw,
    sambanova,
    tfrecord,
)
from penstock.data.formats.hdf5 import SIGNATURE
from penstock.data.formats.indexed import WEIGHTS_SUFFIX
from penstock.data.formats.isolation import hdf5_names
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import damaged
from penstock.errors import DataError
from penstock.files import read_json

_HEAD_BYTES = 4096
_MEGATRON = b"MMIDIDX\0\0"
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_LONGEST_LINE = 64 << 20
_ARCHIVE = b"PK\x03\x04"
_NAMED = {
    ".tfrecord": "tfrecord",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".idx": "megatron",
    ".npy": "npy",
    ".pkl": "pickle",
    ".jsonl": "jsonl",
}
"""What people call files of a format: only to say more of one that does not begin as it should."""
_WILDCARD = re.compile(r"[*?\[]")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a path holds."""

    format: str
    """Name in the registry."""
    splits: dict[str, list[Path]]
    """Files of each split: train, validation, test, as far as there are such."""


def recognize(path: str | Path) -> Found:
    """Find out what a file, a folder, a glob or a Megatron prefix holds.

    Raises:
        DataError: nothing there, nothing known, more than one format, or a damaged file.
    """
    files = _list_files(Path(path))
    named = [(file, recognize_file(file)) for file in files]
    if not any(name for _, name in named):
        # Nothing in a bare stream says what it is: it is one only where nothing else is known.
        named = [(file, "nanogpt" if raw.may_be_bare(file) else None) for file in files]
    known = [(file, name) for file, name in named if name is not None]
    formats = sorted({name for _, name in known})
    if len(formats) != 1:
        kinds = ", ".join(format.title for format in FORMATS.values())
        claimed = _NAMED.get(files[0].suffix.lower()) if files else None
        hint = f": as {FORMATS[claimed].title} it is damaged" if claimed else ""
        raise DataError(
            f"{path} holds {'no known format' + hint if not formats else ' and '.join(formats)}",
            where=str(path),
            do=f"give files of one format, by content one of: {kinds}"
            if not formats
            else "give the files of one format, such as by a glob",
        )
    splits: dict[str, list[Path]] = {}
    for file, _ in known:
        splits.setdefault(split_of(file, Path(path)), []).append(file)
    return Found(formats[0], {n: splits[n] for n in ("train", "validation", "test") if n in splits})


def recognize_file(path: Path) -> str | None:
    """The format of one file, by its content; None where it is none of ours.

    Raises:
        DataError: an HDF5 file that does not read, or has other datasets.
    """
    try:
        with path.open("rb") as handle:
            head = handle.read(_HEAD_BYTES)
            if head.lstrip()[:1] in (b"[", b"{") and b"\n" not in head:
                head += handle.readline(_LONGEST_LINE)
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}", "check the path") from None
    if head.startswith(SIGNATURE):
        return _hdf5_kind(path)
    line = head.lstrip().split(b"\n", 1)[0]
    tests = {
        "megatron": head.startswith(_MEGATRON),
        "npy": head.startswith(npy.MAGIC),
        "llmc": raw.recognises_llmc(head),
        "parquet": head.startswith(arrow.PARQUET),
        "arrow": arrow.recognises(head) and not head.startswith(arrow.PARQUET),
        "pickle": pickled.recognises(head),
        "jsonl": line[:1] in (b"[", b"{") and jsonl.recognises(line),
        "tfrecord": tfrecord.recognises(head),
    }
    return next((name for name, fits in tests.items() if fits), None)


def may_be_data(path: Path) -> bool:
    """Whether a file may be tokens in one of the formats, whole or damaged, or a half of a pair.

    No format begins as an archive does, as executables do; those that end in `.penstock` are none.
    """
    try:
        with path.open("rb") as handle:
            head = handle.read(len(_ARCHIVE))
    except OSError:
        return True  # recognition says why it does not open
    return head != _ARCHIVE and path.suffix != ".penstock"


def split_of(file: Path, root: Path) -> str:
    """The split that a file's name, or its folder's, speaks of; else train."""
    inner = file.relative_to(root).parts if file.is_relative_to(root) else ()
    for part in reversed(inner or (file.name,)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return _SPLITS.get(file.parent.name.lower(), "train")


def _list_files(path: Path) -> list[Path]:
    """Files to look at."""
    if path.is_dir():
        return list(_list_folder(path))
    if path.is_file():
        index = path.with_suffix(".idx")
        is_data = path.suffix == ".bin" and index.is_file()
        return [index] if is_data and recognize_file(index) == "megatron" else [path]
    # A prefix may have dots of its own.
    index = path.with_name(path.name + ".idx")
    if index.is_file():
        return [index]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in found if file.is_file()] if _WILDCARD.search(str(path)) else []
    if not files:
        raise DataError(f"{path} does not exist", where=str(path), do="check the path")
    return list(_without_parts(files))


def _list_folder(folder: Path) -> Iterable[Path]:
    """Files of a folder and of those of its folders that are named as splits."""
    if (folder / arrow_writers.STATE).is_file():
        return _saved_files(folder)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = list(_without_parts(entry for entry in entries if entry.is_file()))
    for entry in entries:
        if entry.is_dir() and entry.name.lower() in _SPLITS:
            files += _list_folder(entry)
    return files


def _without_parts(files: Iterable[Path]) -> Iterable[Path]:
    """Leave out what belongs to another file: a pair's data and its loss weights."""
    files = list(files)
    indices = {file for file in files if file.suffix == ".idx"}
    for file in files:
        base = file.with_name(file.stem.removesuffix(WEIGHTS_SUFFIX) + ".idx")
        if file.stem.endswith(WEIGHTS_SUFFIX) and base in indices:
            continue
        if file.suffix == ".bin" and file.with_suffix(".idx") in indices:
            continue
        yield file


def _saved_files(folder: Path) -> list[Path]:
    """The files state.json of a saved `datasets` folder names, which must lie in it."""
    state = read_json(folder / arrow_writers.STATE)
    try:
        if state.get("_indices_data_files"):
            raise damaged(folder, "has rows in another order by an index", "flatten its indices")
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (AttributeError, KeyError, TypeError):
        raise damaged(folder / arrow_writers.STATE, "names no data files") from None
    for name in names:
        if name != Path(name).name or not (folder / name).is_file():
            raise damaged(folder / arrow_writers.STATE, f"names {name}, which is not in the folder")
    return [folder / name for name in names]


def _hdf5_kind(path: Path) -> str:
    """SambaNova's or Cerebras', by the names of the datasets."""
    names = hdf5_names(path)
    if sambanova.recognises(names):
        return "sambanova"
    if cerebras.recognises(names):
        return "cerebras"
    listed = ", ".join(sorted(names)[:9]) or "nothing"
    raise damaged(path, f"is HDF5 with {listed}: neither input_ids and token_type_ids, nor data")
