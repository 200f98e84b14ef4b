"""One split's sequences into the files of a format, in as many files as the user wants.

`convert.py` and `outputs.py` write through it. It must never know any file layout.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from penstock.console import get_console
from penstock.data.convert_plan import Job
from penstock.data.formats.registry import FORMATS, Format
from penstock.data.formats.sequence import Layout, TokenSequence
from penstock.errors import ConfigError


def require_files(target: Format, files: int) -> None:
    """Refuse several files of a format that has one for each split.

    Raises:
        ConfigError: so it is.
    """
    if files > 1 and not target.many:
        several = ", ".join(name for name, one in FORMATS.items() if one.many)
        raise ConfigError(
            f"{target.title} has one file for each split",
            where="data.files",
            do=f"leave it out, or choose data.format of {several}",
        )


def write_split(job: Job, target: Format, out: Path, files: int) -> list[Path]:
    """Write one split; several files hold equal numbers of sequences, but for one more or less."""
    sequences = iter(job.pieces)
    total = job.found.sequences
    written: list[Path] = []
    with get_console().progress(f"writing {job.split}", job.found.tokens) as progress:
        for file in range(files):
            count = total * (file + 1) // files - total * file // files
            layout = dataclasses.replace(job.layout, file=file, files=files)
            part = itertools.islice(sequences, count)
            for tokens in _write_file(job.split, part, layout, target, out, written):
                progress.advance(tokens)
    return list(dict.fromkeys(written))


def _write_file(
    split: str,
    sequences: Iterator[TokenSequence],
    layout: Layout,
    target: Format,
    out: Path,
    written: list[Path],
) -> Iterator[int]:
    """Write one file, yielding the tokens of each sequence; its paths are added to `written`."""
    writer = target.write(out, split, layout)
    try:
        for sequence in sequences:
            writer.append(sequence)
            yield len(sequence.tokens)
        written += writer.finish()
    except BaseException:
        writer.abandon()
        raise
