"""What `penstock inspect` shows of data in a format other than our own folder's.

`api.inspect` calls it. It reads what is there, and must never write or execute anything.
"""

from pathlib import Path
from typing import Any

from penstock.data.formats.isolation import IsolatedReader
from penstock.data.formats.recognize import recognize
from penstock.data.formats.registry import FORMATS
from penstock.data.formats.sequence import LARGEST_ID, Reader
from penstock.data.measure import measure
from penstock.report.inspection import Inspection

_LARGEST_READ = 256 << 20
"""Data of up to this many bytes is read and counted; of more, only headers are."""
_SHOWN = 8
"""Tokens of the first sequence that are shown."""


def inspect_data(path: Path) -> Inspection:
    """Format, files, and counts by split.

    Raises:
        DataError: nothing known, or damaged.
    """
    found = recognize(path)
    values: dict[str, Any] = {"kind": "data", "path": str(path), "format": found.format}
    splits: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for split, files in found.splits.items():
        reader = FORMATS[found.format].read(files)
        notes += [note for note in reader.facts.notes if note not in notes]
        splits[split] = _split(reader, files, split)
    values |= {"splits": splits, "notes": notes}
    first = next(iter(splits.values()))
    facts = [["format", FORMATS[found.format].title], ["stored as", first["dtype"]]]
    facts += [[name, f"{first[name]:,}"] for name in ("width", "vocab_size") if first[name]]
    facts += [["", note] for note in notes]
    rows = [
        [name, *(_shown(s[key]) for key in ("files", "sequences", "tokens", "longest", "begins"))]
        for name, s in splits.items()
    ]
    columns = ["split", "files", "sequences", "tokens", "longest", "begins with"]
    return Inspection(values, f"Data {path}", facts, columns, rows)


def _split(reader: Reader, files: list[Path], split: str) -> dict[str, Any]:
    """What one split's headers say, and what reading it shows."""
    facts = reader.facts
    values: dict[str, Any] = {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "sequences": facts.sequences,
        "tokens": facts.tokens,
        "dtype": facts.dtype,
        "width": facts.width,
        "vocab_size": facts.vocab_size,
        "longest": None,
        "loss_weights": None,
        "begins": None,
    }
    if (isinstance(reader, IsolatedReader) and reader.is_text) or values["bytes"] > _LARGEST_READ:
        return values
    largest = LARGEST_ID if facts.vocab_size is None else facts.vocab_size - 1
    counted = measure(reader.sequences(), f"the {split} split", facts.padding or 0, largest)
    begins = next(reader.sequences(), None)
    return values | {
        "sequences": counted.sequences,
        "tokens": counted.tokens,
        "longest": counted.longest,
        "largest_token": counted.largest,
        "loss_weights": counted.weighted,
        "begins": [] if begins is None else begins.tokens[:_SHOWN].tolist(),
    }


def _shown(value: object) -> str:
    """A count with its thousands apart, the first ids, or that it was not counted."""
    if value is None:
        return "not counted"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "nothing"
    return f"{value:,}"
