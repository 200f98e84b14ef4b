"""A dataset of any recognised format, opened to train on.

Folders of ours open as they are; what others have prepared is converted once, into the user's
cache. It must never change the source.
"""

import glob
import hashlib
from pathlib import Path

from penstock.config.data import DataSection, TokenizerSection
from penstock.config.folders import user_cache_folder
from penstock.console import get_console
from penstock.data.convert import convert_dataset
from penstock.data.convert_text import find_vocabulary
from penstock.data.dataset import MANIFEST, SCHEMA_VERSION, Dataset
from penstock.data.formats.recognize import recognize
from penstock.errors import ConfigError
from penstock.files import canonical_json


def open_any(path: Path, data: DataSection, tokenizer: TokenizerSection) -> Dataset:
    """Open a dataset folder, or data in another format through its converted copy.

    Raises:
        DataError: nothing known, or damaged.
        ConfigError: data of others, and no tokenizer known.
    """
    if (path / MANIFEST).is_file() or _is_missing(path):
        return Dataset.open(path, data.verify)
    found = recognize(path)
    vocabulary = find_vocabulary(path, tokenizer).tokenizer
    if vocabulary is None:
        raise ConfigError(
            f"the tokenizer {path} was made with is not known",
            where="tokenizer.from",
            do="set tokenizer.from=FOLDER",
        )
    files = [file for split in found.splits.values() for file in split]
    made_from = {
        "version": SCHEMA_VERSION,
        "files": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "tokenizer": vocabulary.sha256,
        "length": data.sequence_length,
    }
    key = hashlib.sha256(canonical_json(made_from).encode()).hexdigest()
    copy = user_cache_folder() / "datasets" / key[:32]
    if not (copy / MANIFEST).is_file():
        get_console().info(f"converting {path} ({found.format}) once, into {copy}")
        section = DataSection(sequence_length=data.sequence_length)
        convert_dataset(path, copy, section, tokenizer)
    return Dataset.open(copy, data.verify)


def _is_missing(path: Path) -> bool:
    """Whether a path is neither there nor a pattern or prefix of files that are."""
    return not (path.exists() or glob.glob(str(path), recursive=True) or glob.glob(f"{path}.idx"))
