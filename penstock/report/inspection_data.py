"""What `penstock inspect` shows of data in any format, our own folders included.

`api.inspect` calls it. It reads what is there, and must never execute anything.
"""

import dataclasses
from pathlib import Path
from typing import Any

from penstock.config.data import TokenizerSection
from penstock.console import Console
from penstock.data.convert_text import find_vocabulary
from penstock.data.dataset import MANIFEST, Dataset
from penstock.data.formats.isolation import IsolatedReader
from penstock.data.formats.recognize import recognize
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import Facts, Reader
from penstock.data.packing import parse_packing
from penstock.data.statistics import Statistics, examine
from penstock.data.tokenizer import Tokenizer

_BAR = 40
"""Characters of the longest bar of a histogram."""
_LEGEND = "green: in the loss; yellow: in part; grey: not"


@dataclasses.dataclass(frozen=True)
class SplitInspection:
    """One split."""

    name: str
    files: int
    bytes: int
    facts: Facts
    statistics: Statistics | None
    """None where the files hold text, no tokens."""
    capacity: int | None
    """Tokens a row has room for, where there are rows."""

    def json(self) -> dict[str, Any]:
        """All figures."""
        facts, found = self.facts, self.statistics
        values: dict[str, Any] = {
            "files": self.files,
            "bytes": self.bytes,
            "sequences": facts.sequences,
            "tokens": facts.tokens,
            "dtype": facts.dtype,
            "width": facts.width,
            "vocab_size": facts.vocab_size,
            "longest": None,
            "loss_weights": None,
            "begins": None,
        }
        if found is None:
            return values
        if found.is_whole:
            values |= {"sequences": found.sequences, "tokens": found.tokens}
        return values | {
            "examined": "all" if found.is_whole else "a sample",
            "examined_sequences": found.sequences,
            "examined_tokens": found.tokens,
            "longest": found.longest,
            "shortest": found.shortest if found.sequences else None,
            "largest_token": found.largest,
            "loss_weights": found.weighted,
            "weight_share": found.weight / found.tokens if found.tokens else None,
            "packing_efficiency": found.efficiency(self.capacity),
            "duplicates": found.duplicates,
            "lengths": [[lengths, count] for lengths, count in found.bins()],
            "tokens_per_word": found.tokens_per_word,
            "tokens_per_byte": found.tokens_per_byte,
            "begins": found.begins,
            "categories": found.categories or None,
        }

    def row(self) -> list[str]:
        """The line of the table."""
        values, found = self.json(), self.statistics
        about = "" if found is None or found.is_whole else "≈ "
        duplicates = None if not (found and found.sequences) else found.duplicates / found.sequences
        return [
            self.name,
            str(self.files),
            _count(values["sequences"]),
            _count(values["tokens"]),
            about + _count(values["longest"]),
            about + _share(values.get("packing_efficiency"), "–"),
            about + _share(values.get("weight_share")),
            about + _share(duplicates),
            _ratio(values.get("tokens_per_word")),
            _ratio(values.get("tokens_per_byte")),
        ]


COLUMNS = (
    "split",
    "files",
    "sequences",
    "tokens",
    "longest",
    "packed",
    "in the loss",
    "duplicates",
    "tokens/word",
    "tokens/byte",
)
"""Heads of the table that `SplitInspection.row` fills."""


@dataclasses.dataclass(frozen=True)
class DataInspection:
    """Everything that was found out about a path."""

    path: Path
    format: str
    splits: list[SplitInspection]
    notes: list[str]
    """What was decided from the data, and what could not be shown."""
    dataset: Dataset | None
    """The manifest, where it is a folder of ours."""
    page: Path | None = None
    """HTML page that was written."""

    @property
    def facts(self) -> list[tuple[str, str]]:
        """(name, value) of what holds for all splits."""
        first = self.splits[0].facts
        rows = [("format", FORMATS[self.format].title), ("stored as", first.dtype)]
        rows += [("row", f"{first.width:,} tokens")] if first.width else []
        if self.dataset is not None:
            manifest = self.dataset.manifest
            sha256 = self.dataset.tokenizer_sha256[:12]
            rows.append(("tokenizer", f"{self.dataset.vocab_size:,} tokens, {sha256}…"))
            rows.append(("packing", str(manifest["packing"])))
        elif first.vocab_size:
            rows.append(("vocabulary", f"{first.vocab_size:,} tokens"))
        counted = [one.statistics.categories for one in self.splits if one.statistics is not None]
        if numbers := {number for one in counted for number in one if number != -1}:
            rows.append(("categories", f"{len(numbers):,}"))
        return rows

    def json(self) -> dict[str, Any]:
        """Everything, for machines; of a folder of ours, its manifest too."""
        splits = {split.name: split.json() for split in self.splits}
        if self.dataset is not None:
            manifest = self.dataset.json()
            merged = {
                n: {**splits.get(n, {}), **counts} for n, counts in manifest["splits"].items()
            }
            return {**manifest, "splits": merged, "notes": self.notes}
        return {
            "kind": "data",
            "path": str(self.path),
            "format": self.format,
            "splits": splits,
            "notes": self.notes,
        }

    def show(self, console: Console) -> None:
        """Counts, lengths, and the beginnings of some sequences with their weights in colour."""
        title = "Dataset" if self.dataset is not None else "Data"
        console.table(f"{title} {self.path}", ["", ""], self.facts)
        # Splits side by side: as lines their ten figures would not fit a terminal's 80 columns.
        heads, *rows = zip(COLUMNS, *(split.row() for split in self.splits), strict=True)
        console.table("", ["", *heads[1:]], rows)
        for note in self.notes:
            console.info(note)
        largest = max(self.splits, key=lambda split: split.bytes)
        if largest.statistics is not None:
            self._show_lengths(console, largest)
            self._show_passages(console, largest)
        if self.page is not None:
            console.path("page", self.page)

    def _show_lengths(self, console: Console, split: SplitInspection) -> None:
        bins = split.statistics.bins() if split.statistics is not None else []
        most = max((count for _, count in bins), default=1)
        left = max((len(lengths) for lengths, _ in bins), default=0)
        right = len(f"{most:,}")
        console.info(f"Lengths in {split.name}: tokens, sequences")
        for lengths, count in bins:
            bar = "█" * round(_BAR * count / most)
            console.info(f"  {lengths:>{left}}  {count:>{right},}  {bar}")

    def _show_passages(self, console: Console, split: SplitInspection) -> None:
        if split.statistics is None or not split.statistics.passages:
            return
        console.info(f"Sequences of {split.name} ({_LEGEND})")
        for passage in split.statistics.passages:
            console.info(f"  sequence {passage.sequence:,}, {passage.tokens:,} tokens")
            console.passage([(text, _style(weight)) for text, weight in passage.parts])


def _style(weight: float) -> str:
    return "bright_black" if weight == 0 else "green" if weight == 1 else "yellow"


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "not counted"


def _share(value: float | None, unknown: str = "not counted") -> str:
    return unknown if value is None else f"{value:.1%}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def inspect_data(path: Path, tokenizer: TokenizerSection) -> DataInspection:
    """Format, files, counts and samples by split.

    Raises:
        DataError: nothing known, or damaged.
    """
    dataset = Dataset.open(path) if (path / MANIFEST).is_file() else None
    found = recognize(path)
    vocabulary = find_vocabulary(path, tokenizer).tokenizer
    notes: list[str] = []
    splits: list[SplitInspection] = []
    for name, files in found.splits.items():
        reader = FORMATS[found.format].read(files)
        notes += [note for note in reader.facts.notes if note not in notes]
        splits.append(_split(reader, found.format, files, name, vocabulary, dataset))
    if vocabulary is None and any(split.statistics for split in splits):
        notes.append("set tokenizer.from=FOLDER to see text instead of token ids")
    if any(split.statistics is not None and not split.statistics.is_whole for split in splits):
        notes.append("figures with ≈ are of a sample of the sequences, since there are many")
    return DataInspection(path, found.format, splits, notes, dataset)


def _split(
    reader: Reader,
    format: str,
    files: list[Path],
    name: str,
    tokenizer: Tokenizer | None,
    dataset: Dataset | None,
) -> SplitInspection:
    is_text = isinstance(reader, IsolatedReader) and reader.is_text
    size = sum(file.stat().st_size for file in files)
    size += sum(f.with_suffix(".bin").stat().st_size for f in files if f.suffix == ".idx")
    capacity = reader.facts.width
    if dataset is not None and dataset.sequence_length is not None:
        rows = parse_packing(str(dataset.manifest["packing"])).kind != "full"
        capacity = dataset.sequence_length + 1 if rows else None
    statistics = None if is_text else examine(reader, format, files, name, tokenizer)
    return SplitInspection(name, len(files), size, reader.facts, statistics, capacity)
