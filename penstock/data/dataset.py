"""A prepared dataset: its manifest, its splits, and samples cut from them.

`prepare` writes what this opens; the loader and evaluation read from it. It must never know about
batches or training.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.config.checksums import remembered_sha256
from penstock.console import Console, get_console
from penstock.data.formats.megatron import Reader
from penstock.data.packing import parse_packing
from penstock.data.samples import HeldOut, SplitSamples
from penstock.data.tokenizer import Tokenizer
from penstock.errors import DataError
from penstock.files import read_json

MANIFEST = "dataset.json"
PREPARED = "prepared.json"
"""The manifest of what `prepare` wrote in another format than ours: to train on it, `members.py`
opens it as it opens data of others."""
TOKENIZER = "tokenizer.json"
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a dataset."""

    name: str
    reader: Reader
    packing: str
    end_of_text: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the split's text."""
    words: int
    """Whitespace-separated words of the split's text."""
    weights: NDArray[np.float32] | None = None
    """Loss weight of each token as a target, where the dataset has them."""

    @property
    def token_count(self) -> int:
        """Tokens it has."""
        return len(self.reader.tokens)

    @property
    def tokens(self) -> NDArray[Any]:
        """All tokens back to back, (N,), read-only, memory-mapped."""
        return self.reader.tokens

    def samples(self, sequence_length: int) -> int:
        """Sequences of one pass over the split."""
        if parse_packing(self.packing).kind != "full":
            return len(self.reader.lengths)
        return max(0, -(-(self.token_count - 1) // sequence_length))

    def sample(
        self, index: int, sequence_length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Inputs, targets (T,) int64 and loss weights (T,) float32 of one sequence.

        Full packing cuts the stream every T tokens, so that each token is a target once; rows are
        padded with end-of-text, at weight 0.
        """
        first, last = self._range(index, sequence_length)
        count = max(0, last - first - 1)
        tokens = np.full(sequence_length + 1, self.end_of_text, np.int64)
        tokens[: last - first] = self.tokens[first:last]
        weights = np.zeros(sequence_length, np.float32)
        weights[:count] = 1.0 if self.weights is None else self.weights[first + 1 : last]
        return tokens[:-1], tokens[1:], weights

    def length(self, index: int, sequence_length: int) -> int:
        """How many inputs of a sequence are not padding."""
        first, last = self._range(index, sequence_length)
        return min(last - first, sequence_length)

    def _range(self, index: int, sequence_length: int) -> tuple[int, int]:
        """Tokens of a sequence and of its last target: first, and end."""
        if parse_packing(self.packing).kind == "full":
            first = index * sequence_length
            return first, min(first + sequence_length + 1, self.token_count)
        first = int(self.reader.starts[index])
        return first, first + min(int(self.reader.lengths[index]), sequence_length + 1)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An opened dataset folder."""

    path: Path
    manifest: dict[str, Any]

    @staticmethod
    def open(path: str | Path, verify: str = "checksum", name: str = MANIFEST) -> "Dataset":
        """Open and check a dataset folder.

        `verify` "size" compares sizes; "checksum" SHA-256 too, remembering files already checked.

        Raises:
            DataError: missing, damaged, truncated, or of a newer schema.
        """
        path = Path(path)
        if not (path / name).is_file():
            raise DataError(
                f"{path} is not a dataset (it has no {name})",
                where="data.path",
                do="make one with `penstock prepare data.path=FOLDER`",
            )
        manifest = read_json(path / name)
        try:
            if manifest["schema_version"] != SCHEMA_VERSION:
                raise DataError(
                    f"{path} has schema version {manifest['schema_version']}",
                    where="data.path",
                    do="prepare it again with this version",
                )
            _check_files(path, manifest["files"], verify)
            dataset = Dataset(path, manifest)
            for split in manifest["splits"].keys():  # noqa: SIM118 - refuses what is no mapping
                if name == MANIFEST:
                    _check_counts(dataset, split)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{path / name} is not a dataset's manifest ({error!r})",
                where="data.path",
                do="prepare the dataset again",
            ) from None
        return dataset

    def split(self, name: str) -> Split:
        """Open one split.

        Raises:
            DataError: no such split.
        """
        facts = self.manifest["splits"].get(name)
        if facts is None:
            raise DataError(
                f"{self.path} has no split {name}",
                where="data.split",
                do=f"choose {', '.join(self.manifest['splits'])}",
            )
        weights = self.path / f"{name}_loss_weights"
        reader = Reader(self.path / name)
        return Split(
            name=name,
            reader=reader,
            packing=str(self.manifest["packing"]),
            end_of_text=self.end_of_text,
            documents=int(facts["documents"]),
            text_bytes=int(facts["text_bytes"]),
            words=int(facts["words"]),
            weights=Reader(weights).tokens if weights.with_suffix(".idx").exists() else None,
        )

    def training(self, split: str, sequence_length: int, seed: int) -> SplitSamples:
        """The samples of one split, in an order of `seed`.

        Raises:
            DataError: no such split, or not one sequence in it.
        """
        return SplitSamples(self.split(split), sequence_length, seed=seed)

    def validation(self, split: str, sequence_length: int, limit: int | None) -> list[HeldOut]:
        """A fixed choice of `limit` samples; none, saying so, where the split is too small."""
        opened = self.split(split)
        if opened.samples(sequence_length) < 1:
            get_console().warning(f"split {split} of {self.path} is too small: no validation")
            return []
        return [HeldOut("", 1.0, SplitSamples(opened, sequence_length, limit=limit))]

    def announce(self, split: str, sequence_length: int) -> None:
        """Nothing: one dataset needs no words."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the dataset was made with."""
        return Tokenizer.load(self.path / str(self.manifest["tokenizer"].get("file", TOKENIZER)))

    @property
    def vocab_size(self) -> int:
        """Tokens of its tokenizer."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def end_of_text(self) -> int:
        """Its tokenizer's end-of-text token."""
        return int(self.manifest["tokenizer"]["end_of_text"])

    @property
    def sequence_length(self) -> int | None:
        """Tokens per sequence it was prepared for, where one was given."""
        return self.manifest.get("sequence_length")

    @property
    def tokenizer_sha256(self) -> str:
        """Identity of its tokenizer."""
        return str(self.manifest["tokenizer"]["sha256"])

    def json(self) -> dict[str, Any]:
        """The manifest and where it lies."""
        return {"kind": "dataset", "path": str(self.path), **self.manifest}

    def show(self, console: Console) -> None:
        """Counts by split."""
        tokenizer = self.manifest["tokenizer"]
        console.table(
            f"Dataset {self.path}",
            ["split", "documents", "tokens", "text bytes", "words"],
            [
                [name, *(f"{facts[k]:,}" for k in ("documents", "tokens", "text_bytes", "words"))]
                for name, facts in self.manifest["splits"].items()
            ],
        )
        console.info(
            f"tokenizer: {tokenizer['vocab_size']:,} tokens, {tokenizer['sha256'][:12]}…; "
            f"packing: {self.manifest['packing']}"
        )


def _check_counts(dataset: Dataset, name: str) -> None:
    """The manifest's token count must be the file's."""
    split = dataset.split(name)
    stated = int(dataset.manifest["splits"][name]["tokens"])
    if split.token_count != stated or stated < 0:
        raise DataError(
            f"{dataset.path / name}.bin has {split.token_count} tokens, {MANIFEST} says {stated}",
            where="data.path",
            do="prepare the dataset again",
        )
    if split.weights is not None and len(split.weights) != split.token_count:
        raise DataError(
            f"{name}_loss_weights does not match {name}", where="data.path", do="prepare it again"
        )


def is_inside(name: str) -> bool:
    """Whether a path that a manifest names stays in its folder."""
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _check_files(path: Path, files: dict[str, Any], verify: str) -> None:
    """Sizes and, with "checksum", SHA-256 of every file; names must stay in the folder."""
    for name, facts in files.items():
        if not is_inside(name):
            raise DataError(
                f"{MANIFEST} names {name}, outside the folder", where=str(path), do="do not use it"
            )
        file = path / name
        if not file.is_file():
            raise DataError(f"{file} is missing", where="data.path", do="prepare the dataset again")
        size = file.stat().st_size
        if size != int(facts["bytes"]):
            raise DataError(
                f"{file} has {size} bytes, {MANIFEST} says {facts['bytes']}",
                where="data.path",
                do="copy it again, or prepare the dataset again",
            )
        if verify == "checksum" and remembered_sha256(file) != facts["sha256"]:
            raise DataError(
                f"{file} does not have the checksum {MANIFEST} gives",
                where="data.path",
                do="copy it again, or prepare the dataset again",
            )


def read_documents(split: Split) -> Iterator[NDArray[Any]]:
    """Tokens of each stored sequence, in order."""
    for start, length in zip(split.reader.starts, split.reader.lengths, strict=True):
        yield split.tokens[start : start + length]
