"""One prepared dataset's format into another's, saying what the other cannot hold.

`api.convert` calls `convert_dataset`. Sequences, loss weights and roles pass from the reader to
the writer one at a time; nothing is written before everything has been read once. It must never
know any file layout.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from penstock.config.schema import DataSection, TokenizerSection
from penstock.console import Console, get_console
from penstock.data.convert_manifest import make_dataset
from penstock.data.convert_text import Vocabulary, find_vocabulary, tokenized
from penstock.data.formats.recognize import Found, recognize
from penstock.data.formats.registry import FORMATS, Format
from penstock.data.formats.sequence import LARGEST_ID, Layout, Reader, TokenSequence
from penstock.data.measure import Measure, measure
from penstock.data.packing import parse_packing
from penstock.errors import ConfigError, DataError
from penstock.files import fsync_folder


@dataclasses.dataclass(frozen=True)
class DatasetConversion:
    """A dataset that was written in another format."""

    source: str
    """Format read."""
    target: str
    """Format written."""
    folder: Path
    splits: dict[str, dict[str, int]]
    """Sequences and tokens of each split."""
    files: list[Path]
    lost: list[str]
    """What the target cannot hold."""
    notes: list[str]
    """What was decided from the data."""

    def json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "from": self.source,
            "to": self.target,
            "folder": str(self.folder),
            "splits": self.splits,
            "files": [str(path.relative_to(self.folder)) for path in self.files],
            "lost": self.lost,
            "notes": self.notes,
        }

    def show(self, console: Console) -> None:
        """Counts, and where it is; what is lost has been said already."""
        console.table(
            f"{FORMATS[self.source].title} → {FORMATS[self.target].title}",
            ["split", "sequences", "tokens"],
            [[n, f"{c['sequences']:,}", f"{c['tokens']:,}"] for n, c in self.splits.items()],
        )
        console.path("dataset", self.folder)


class _Pieces:
    """A reader's sequences, cut where they are longer than rows of a given length."""

    def __init__(self, reader: Reader, length: int | None, extra: int) -> None:
        """None: nothing is cut. `extra`: tokens a row holds beyond its length."""
        self._reader, self._length, self._extra = reader, length, extra
        self.cuts = 0
        """Sequences that had to be cut so far."""

    def __iter__(self) -> Iterator[TokenSequence]:
        """Yield the pieces; where rows hold shifted labels too, they overlap by one token, so
        that each token is a target once.
        """
        for sequence in self._reader.sequences():
            count, length = len(sequence.tokens), self._length
            if length is None or count <= length + self._extra:
                yield sequence
                continue
            self.cuts += 1
            for first in range(0, count - self._extra, length):
                part = slice(first, first + length + self._extra)
                yield TokenSequence(
                    sequence.tokens[part],
                    None if sequence.weights is None else sequence.weights[part],
                    None if sequence.roles is None else sequence.roles[part],
                )


@dataclasses.dataclass(frozen=True)
class _Job:
    """One split's way from reader to writer."""

    split: str
    pieces: _Pieces
    found: Measure
    layout: Layout


def convert_dataset(
    source: Path, out: Path, data: DataSection, tokenizer: TokenizerSection
) -> DatasetConversion:
    """Write what `source` holds into the new folder `out` as `data.format`.

    Sequences longer than `data.sequence_length` are cut.

    Raises:
        DataError: a damaged source, or one the target can hold nothing of.
        ConfigError: settings that contradict each other.
    """
    found, target = recognize(source), FORMATS[data.format]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty", where="out", do="name a new folder")
    packed = _is_packed(data)
    vocabulary = find_vocabulary(source, tokenizer)
    notes: list[str] = []
    jobs: list[_Job] = []
    lost: dict[str, None] = {}
    for split, reader in _readers(found, vocabulary, notes).items():
        job, losses = _plan(split, reader, target, data, vocabulary, packed)
        jobs.append(job)
        lost.update(dict.fromkeys(losses))
    finish = _finisher(jobs, found, data, vocabulary, notes)
    files = _write_all(jobs, target, out, finish)
    _say(notes, list(lost), target)
    splits = {
        job.split: {"sequences": job.found.sequences, "tokens": job.found.tokens} for job in jobs
    }
    return DatasetConversion(found.format, data.format, out, splits, files, list(lost), notes)


def _finisher(
    jobs: list[_Job], found: Found, data: DataSection, vocabulary: Vocabulary, notes: list[str]
) -> Callable[[Path], list[Path]]:
    """What makes the written folder whole: a dataset of ours, where the tokenizer is known."""
    tokenizer = vocabulary.tokenizer
    if data.format != "megatron":
        return lambda folder: []
    if tokenizer is None:
        notes.append("set tokenizer.from=FOLDER too to make a dataset that `train` opens")
        return lambda folder: []
    rows = FORMATS[found.format].fixed_width or any(job.found.weighted for job in jobs)
    kind = "each sequence is a sample" if rows else "sequences are one stream"
    notes.append(f"the folder is a dataset that `train` opens: {kind}")
    return lambda folder: make_dataset(
        folder,
        tokenizer,
        rows=rows,
        sequence_length=data.sequence_length
        or (max(1, *(job.found.longest - 1 for job in jobs)) if rows else None),
        source=found.format,
    )


def _write_all(
    jobs: list[_Job], target: Format, out: Path, finish: Callable[[Path], list[Path]]
) -> list[Path]:
    """Write every split into a folder beside `out`, which takes its place once it is whole."""
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        files = [path for job in jobs for path in _write(job, target, staging)]
        files += finish(staging)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync_folder(out.parent)
    return [out / path.relative_to(staging) for path in dict.fromkeys(files)]


def _say(notes: list[str], lost: list[str], target: Format) -> None:
    console = get_console()
    for note in notes:
        console.info(note)
    if lost:
        console.warning(f"{target.title} cannot hold {'; '.join(lost)}: this is lost")


def _is_packed(data: DataSection) -> bool:
    """Conversion keeps sequences as they are; only Cerebras' files mark several in a row."""
    if parse_packing(data.packing).kind == "full":
        return False
    target: str = data.format
    if target == "cerebras" and parse_packing(data.packing).kind == "greedy":
        return True
    raise ConfigError(
        f"converting to {data.format} does not pack",
        where="data.packing",
        do="leave data.packing out, or prepare from the text; greedy:: is for data.format=cerebras",
    )


def _readers(found: Found, vocabulary: Vocabulary, notes: list[str]) -> dict[str, Reader]:
    """A reader for each split; text is tokenized where there is a tokenizer."""
    readers: dict[str, Reader] = {}
    for split, files in found.splits.items():
        reader = FORMATS[found.format].read(files)
        notes += [note for note in reader.facts.notes if note not in notes]
        readers[split] = tokenized(reader, vocabulary)
    return readers


def _plan(
    split: str,
    reader: Reader,
    target: Format,
    data: DataSection,
    vocabulary: Vocabulary,
    packed: bool,
) -> tuple[_Job, list[str]]:
    """Measure a split; what its writer needs to know, and what will be lost."""
    facts = reader.facts
    vocab_size = vocabulary.size or facts.vocab_size
    padding = next((p for p in (vocabulary.padding, facts.padding, 0) if p is not None), 0)
    largest = LARGEST_ID if vocab_size is None else vocab_size - 1
    cut = data.sequence_length
    pieces = _Pieces(reader, cut, target.extra)
    found = measure(pieces, f"the {split} split", padding, largest)
    if found.largest > target.largest:
        raise DataError(
            f"{target.title} cannot hold token {found.largest}, only up to {target.largest}",
            where="data.format",
            do="choose another format",
        )
    width = cut or max(1, found.longest - target.extra)
    if target.longest is not None and found.longest > target.longest + target.extra:
        raise ConfigError(
            f"the {split} split has a sequence of {found.longest:,} tokens",
            where="data.sequence_length",
            do="set data.sequence_length, which cuts longer sequences",
        )
    layout = Layout(
        width=width if target.fixed_width else max(1, found.longest),
        sequences=found.sequences,
        tokens=found.tokens,
        equal=found.equal,
        padding=padding,
        vocab_size=vocab_size,
        largest=found.largest,
        weights=found.weighted,
        roles=found.roles,
        packed=packed,
    )
    lost = _losses(found, target, packed)
    if pieces.cuts:
        lost.insert(0, f"{pieces.cuts:,} sequences of more than {width} tokens in one piece")
    return _Job(split, pieces, found, layout), lost


def _losses(found: Measure, target: Format, packed: bool) -> list[str]:
    """What a format cannot hold of such sequences."""
    borders = target.borders == "any" or (target.borders == "equal lengths" and found.equal)
    cases = {
        "borders between sequences": found.sequences > 1 and not borders,
        "loss weights": found.weighted and target.weights == "none",
        "loss weights other than 0 and 1": found.fractional and target.weights == "zero or one",
        "roles of tokens": found.roles and not target.roles,
        "the weight of a sequence's first token": found.first_alone and not target.first_weight,
        "the end of sequences that end like padding": bool(found.like_padding)
        and target.fixed_width,
        "sequences without tokens": bool(found.empty) and packed,
    }
    return [what for what, is_lost in cases.items() if is_lost]


def _write(job: _Job, target: Format, out: Path) -> list[Path]:
    """Write one split."""
    writer = target.write(out, job.split, job.layout)
    try:
        with get_console().progress(f"writing {job.split}", job.found.tokens) as progress:
            for sequence in job.pieces:
                writer.append(sequence)
                progress.advance(len(sequence.tokens))
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise
