"""One prepared dataset's format into another's, saying what the other cannot hold.

`api.convert` calls `convert_dataset`. Sequences, loss weights and roles pass from the reader to
the writer one at a time; nothing is written before everything has been read once. It must never
know any file layout.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.config.data import DataSection, TokenizerSection
from penstock.console import Console, get_console
from penstock.data.convert_manifest import make_dataset
from penstock.data.convert_plan import Job, plan_conversion
from penstock.data.convert_text import Vocabulary, find_vocabulary, tokenized
from penstock.data.dataset import TOKENIZER
from penstock.data.formats.recognize import Found, recognize
from penstock.data.formats.registry import FORMATS, Format
from penstock.data.formats.sambanova_metadata import add_checksums
from penstock.data.formats.sequence import Reader
from penstock.data.tokenizer import Tokenizer
from penstock.data.write_split import require_files, write_split
from penstock.errors import ConfigError
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
    require_files(target, data.files)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty", where="out", do="name a new folder")
    vocabulary = find_vocabulary(source, tokenizer)
    notes: list[str] = []
    readers = _readers(found, vocabulary, notes)
    jobs, lost = plan_conversion(readers, target, data, vocabulary)
    finish = _finisher(jobs, found, data, vocabulary, notes)
    files = _write_all(jobs, target, out, data.files, finish)
    _say(notes, lost, target)
    splits = {
        job.split: {"sequences": job.found.sequences, "tokens": job.found.tokens} for job in jobs
    }
    return DatasetConversion(found.format, data.format, out, splits, files, lost, notes)


def _finisher(
    jobs: list[Job], found: Found, data: DataSection, vocabulary: Vocabulary, notes: list[str]
) -> Callable[[Path], list[Path]]:
    """What makes the written folder whole: a dataset of ours, or SambaNova's tokenizer folder."""
    tokenizer = vocabulary.tokenizer
    if data.format == "sambanova" and tokenizer is not None:
        return lambda folder: _save_tokenizer(tokenizer, folder)
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


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[Path]:
    """SambaNova's tokenizer folder, with its checksums; returns the files."""
    tokenizer.save(folder / "tokenizer" / TOKENIZER, settings=True)
    saved = sorted((folder / "tokenizer").iterdir())
    return [*saved, add_checksums(folder, [(path.relative_to(folder), path) for path in saved])]


def _write_all(
    jobs: list[Job],
    target: Format,
    out: Path,
    count: int,
    finish: Callable[[Path], list[Path]],
) -> list[Path]:
    """Write every split into a folder beside `out`, which takes its place once it is whole."""
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        files = [path for job in jobs for path in write_split(job, target, staging, count)]
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


def _readers(found: Found, vocabulary: Vocabulary, notes: list[str]) -> dict[str, Reader]:
    """A reader for each split; text is tokenized where there is a tokenizer."""
    readers: dict[str, Reader] = {}
    for split, files in found.splits.items():
        reader = FORMATS[found.format].read(files)
        notes += [note for note in reader.facts.notes if note not in notes]
        readers[split] = tokenized(reader, vocabulary)
    return readers
