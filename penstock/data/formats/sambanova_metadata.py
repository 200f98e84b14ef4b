"""metadata.yaml and the checksums beside SambaNova's HDF5 files, as their own tool writes them.

`sambanova.py` calls it for each file, `data/outputs.py` for a whole folder. It must never open an
HDF5 file. Source: sambanova/generative_data_prep, utils/utils.py (create_sha256, validate_sha256),
processors/metrics.py, utils/add_metadata_to_dataset.py (what is null where it is not known).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from penstock.data.formats.sequence import Layout
from penstock.files import atomic_write, read_json, sha256_file

METADATA, CHECKSUMS = "metadata.yaml", "sha256/files_metadata.json"
_LARGEST_METADATA = 1 << 20


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one file holds."""

    rows: int
    prompt: int
    """Tokens of prompts; the others are of these kinds."""
    completion: int
    padding: int
    separators: int


def vocab_size(path: Path) -> int | None:
    """Vocabulary as metadata.yaml names it, if there is one that reads."""
    if not path.is_file() or path.stat().st_size > _LARGEST_METADATA:
        return None
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    size = value.get("vocab_size") if isinstance(value, dict) else None
    return size if isinstance(size, int) and size > 0 else None


def write_metadata(folder: Path, split: str, layout: Layout, counts: Counts) -> Path:
    """Write metadata.yaml with a file's counts added; those of other splits stay.

    `split`: train, dev or test. Returns its path.
    """
    path = folder / METADATA
    values: dict[str, Any] = {
        "max_batch_size_train": None,
        "max_batch_size_dev": None,
        "number_of_training_files": 0,
        "number_of_dev_files": 0,
        "number_of_test_files": 0,
        "tokenizer_model_type": None,
    }
    if path.is_file():
        values |= yaml.safe_load(path.read_text(encoding="utf-8"))
    former = {} if layout.file == 0 else values
    own = _split_counts(split, layout, counts, former)
    largest = counts.rows
    if layout.file:
        largest = min(largest, values.get(f"max_batch_size_{split}") or 0)
    if split != "test":
        own[f"max_batch_size_{split}"] = largest or None
    name = "training" if split == "train" else split
    values |= own | {
        "max_seq_length": layout.width,
        "token_type_ids": True,
        "vocab_size": layout.vocab_size,
        f"number_of_{name}_files": layout.files,
    }
    atomic_write(path, yaml.safe_dump(values, sort_keys=True))
    return path


def _split_counts(
    split: str, layout: Layout, counts: Counts, former: Mapping[str, Any]
) -> dict[str, Any]:
    """The split's counts with a file's added to those of the files before it, `former`.

    An article ends with a separator, which counts as completion. What was read and dropped is known
    where the rows come from text, else null.
    """
    origin = layout.origin
    added = {
        "sequences": counts.rows,
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion + counts.separators,
        "padding_tokens": counts.padding,
        "output_tokens": counts.rows * layout.width,
    }
    own: dict[str, Any] = {
        f"{split}_{key}": former.get(f"{split}_{key}", 0) + n for key, n in added.items()
    }
    kept = own[f"{split}_prompt_tokens"] + own[f"{split}_completion_tokens"]
    known = {
        "articles": former.get(f"{split}_articles", 0) + counts.separators
        if origin is None
        else origin.documents,
        "input_tokens": None if origin is None else origin.tokens,
        "tokens_dropped_from_packing": None if origin is None else origin.dropped,
        "tokens_dropped_from_all_prompt": None
        if origin is None
        else max(0, origin.tokens - origin.dropped - kept),
    }
    return own | {f"{split}_{key}": value for key, value in known.items()}


def add_checksums(folder: Path, files: Iterable[tuple[Path, Path]]) -> Path:
    """Note files in the folder's `sha256/files_metadata.json`; returns its path.

    `files`: each one's name within the folder, and where it lies now. The tool's check looks for
    every file there is, and fails without; it joins the names of folders by underscores.
    """
    path = folder / CHECKSUMS
    known = read_json(path) if path.is_file() else {}
    for name, file in files:
        status = file.stat()
        known["_".join(name.parts)] = {
            "sha256": sha256_file(file),
            "size": status.st_size,
            "modified_time": status.st_mtime,
        }
    atomic_write(path, json.dumps(known, indent=4))
    return path
