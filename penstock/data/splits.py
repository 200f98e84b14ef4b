"""Which split a document belongs to: by a stable hash, or by its place in one of only a few files.

`data/prepare.py` assigns files, `data/tokenize.py` asks for documents. It must never tokenize.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

from penstock.config.data import SourceSection
from penstock.data.sources.files import SourceFile
from penstock.data.sources.reading import line_start_after, utf8_size

SPLITS = ("train", "validation", "test")
_FEW_FILES = 20
"""With fewer files than this, each is cut into contiguous train, validation and test parts."""
_LARGEST_SHARE = 0.25
_LARGEST_MULTIPLE = 4
"""A file of more than this share of a held-out split, and this multiple of the mean size, stays in
the train split: scores should speak of the corpus, not of one file."""


def choose_split(document: str, fractions: Sequence[float]) -> str:
    """The split of a document by a stable hash of its id, in the given proportions."""
    place = _place(document) * sum(fractions)
    if place < fractions[0]:
        return SPLITS[0]
    return SPLITS[1] if place < fractions[0] + fractions[1] else SPLITS[2]


def _place(document: str) -> float:
    """A stable hash, evenly spread over 0 to 1."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "little") / 2**64


def assign_splits(
    files: list[SourceFile], source: SourceSection, fractions: Sequence[float]
) -> list[SourceFile]:
    """Fix the split of each file where a file is a document; else documents are hashed later.

    Files are cut into parts when they are few. When hashing leaves a split empty, the files in the
    order of their hashes are shared out by size.
    """
    if source.kind not in ("text", "stdlib") or source.documents not in (None, "file"):
        return files
    if len(files) < _FEW_FILES:
        return _cut_files(files, source, fractions)
    total = sum(file.size for file in files)
    limit = max(
        _LARGEST_SHARE * min(fractions[1:]) / sum(fractions) * total,
        _LARGEST_MULTIPLE * total / len(files),
    )
    assigned = [
        dataclasses.replace(
            file, split=SPLITS[0] if file.size > limit else choose_split(file.id, fractions)
        )
        for file in files
    ]
    filled = {file.split for file in assigned if file.size}
    wanted = {name for name, part in zip(SPLITS, fractions, strict=True) if part > 0}
    return assigned if wanted <= filled else _share_out(files, fractions)


def _share_out(files: Sequence[SourceFile], fractions: Sequence[float]) -> list[SourceFile]:
    """Give each split at least one file, in the order of the files' hashes, and train the rest."""
    left = sorted(files, key=lambda file: _place(file.id))
    total = sum(file.size for file in files)
    assigned: list[SourceFile] = []
    for name, part in zip(SPLITS[1:], fractions[1:], strict=True):
        missing = part / sum(fractions) * total
        while missing > 0 and len(left) > 1:
            assigned.append(dataclasses.replace(left.pop(), split=name))
            missing -= assigned[-1].size
    assigned += [dataclasses.replace(file, split=SPLITS[0]) for file in left]
    return sorted(assigned, key=lambda file: file.id)


def _cut_files(
    files: Sequence[SourceFile], source: SourceSection, fractions: Sequence[float]
) -> list[SourceFile]:
    """Cut each file at line ends into contiguous parts, one for each split."""
    parts: list[SourceFile] = []
    for file in files:
        size = utf8_size(file, source)
        first = line_start_after(file, source, int(size * fractions[0] / sum(fractions)))
        second = line_start_after(file, source, int(size * sum(fractions[:2]) / sum(fractions)))
        bounds = (0, first, max(first, second), size)
        for name, start, end in zip(SPLITS, bounds, bounds[1:], strict=False):
            if end > start:
                part = dataclasses.replace(file, start=start, end=end, split=name)
                parts.append(dataclasses.replace(part, id=f"{file.id}#{name}", size=end - start))
    return parts
