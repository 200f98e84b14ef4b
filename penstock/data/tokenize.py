"""Tokenize shards of the source into Megatron files, in worker processes, resumably.

`data/prepare.py` calls `tokenize_shards`. A shard's output depends on its files alone, so the
number of workers and interruptions leave no trace in the bytes.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penstock.config.data import SourceSection
from penstock.console import get_console
from penstock.data.formats.megatron import Writer, token_dtype
from penstock.data.sources.files import SourceFile
from penstock.data.sources.reading import Piece, cut_file, read_pieces
from penstock.data.splits import SPLITS, choose_split
from penstock.data.tokenizer import Tokenizer
from penstock.files import atomic_write
from penstock.workers import worker_pool

_BATCH_CHARACTERS = 1 << 20
_FACTS = "facts.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A unit of work: some files, and where their tokens go."""

    index: int
    files: tuple[SourceFile, ...]
    folder: str

    def facts(self) -> dict[str, dict[str, int]] | None:
        """Counts by split, once the shard is done."""
        try:
            return json.loads((Path(self.folder) / _FACTS).read_bytes())
        except (OSError, ValueError):
            return None

    @property
    def open_split(self) -> str | None:
        """The split whose last document goes on in the next shard, if one does."""
        return self.files[-1].split if self.files[-1].continues else None

    @property
    def bytes(self) -> int:
        """Bytes on disk of its files."""
        return sum(file.size for file in self.files)


def make_shards(
    files: Sequence[SourceFile], section: SourceSection, shard_bytes: int, folder: Path
) -> list[Shard]:
    """Group consecutive files, or ranges of large ones, into shards of about `shard_bytes`."""
    groups: list[list[SourceFile]] = []
    room = 0
    for file in files:
        for part in cut_file(file, section, shard_bytes):
            if room <= 0:
                groups.append([])
                room = shard_bytes
            groups[-1].append(part)
            room -= part.size
    return [Shard(i, tuple(g), str(folder / f"shard-{i:06}")) for i, g in enumerate(groups)]


def tokenize_shards(
    shards: Sequence[Shard],
    section: SourceSection,
    fractions: Sequence[float],
    tokenizer: Path,
    workers: int,
) -> None:
    """Tokenize every shard not done yet. The first error stops the rest."""
    missing = [shard for shard in shards if shard.facts() is None]
    done = sum(shard.bytes for shard in shards) - sum(shard.bytes for shard in missing)
    if done:
        get_console().info(f"{len(shards) - len(missing)} of {len(shards)} shards were done before")
    total = sum(shard.bytes for shard in shards)
    with get_console().progress("tokenizing", total) as progress:
        progress.advance(done)
        for shard in _run(missing, section, fractions, tokenizer, workers):
            progress.advance(shard.bytes, text=f"{progress.done / 2**20:.0f} MiB")


def _run(
    shards: Sequence[Shard],
    section: SourceSection,
    fractions: Sequence[float],
    tokenizer: Path,
    workers: int,
) -> Iterator[Shard]:
    """Work through the shards, here when one process is enough, and yield each when done."""
    workers = min(workers, len(shards))
    if workers <= 1:
        loaded = Tokenizer.load(tokenizer)
        for shard in shards:
            _tokenize(shard, section, fractions, loaded)
            yield shard
        return
    with worker_pool(workers, _prepare_worker, (str(tokenizer),)) as pool:
        jobs = {pool.submit(_work, shard, section, tuple(fractions)): shard for shard in shards}
        for job in concurrent.futures.as_completed(jobs):
            job.result()
            yield jobs[job]


_worker_tokenizer: list[Tokenizer] = []


def _prepare_worker(tokenizer: str) -> None:
    """Load the tokenizer once per process; one thread each, as there is a process per core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer[:] = [Tokenizer.load(tokenizer)]


def _work(shard: Shard, section: SourceSection, fractions: Sequence[float]) -> None:
    _tokenize(shard, section, fractions, _worker_tokenizer[0])


def _tokenize(
    shard: Shard, section: SourceSection, fractions: Sequence[float], tokenizer: Tokenizer
) -> None:
    """Write one shard's tokens by split; its facts come last and make it count."""
    folder = Path(shard.folder)
    dtype = token_dtype(tokenizer.vocab_size)
    facts = _no_facts()
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(Writer(folder / name, dtype)) for name in SPLITS}
        for batch in _batches(shard, section, fractions):
            ids = tokenizer.encode_batch([piece.text for _, piece in batch])
            for (split, piece), tokens in zip(batch, ids, strict=True):
                if piece.ends:
                    tokens.append(tokenizer.end_of_text)
                writers[split].append(np.array(tokens, dtype), ends=piece.ends)
                _count(facts[split], piece)
    atomic_write(folder / _FACTS, json.dumps(facts))


def _no_facts() -> dict[str, dict[str, Any]]:
    return {name: {"documents": 0, "text_bytes": 0, "words": 0} for name in SPLITS}


def _count(facts: dict[str, int], piece: Piece) -> None:
    facts["documents"] += piece.ends
    facts["text_bytes"] += len(piece.text.encode())
    facts["words"] += len(piece.text.split())


def _batches(
    shard: Shard, section: SourceSection, fractions: Sequence[float]
) -> Iterator[list[tuple[str, Piece]]]:
    """Pieces with their splits, about `_BATCH_CHARACTERS` at a time."""
    batch: list[tuple[str, Piece]] = []
    size = 0
    for split, piece in split_pieces(shard.files, section, fractions):
        batch.append((split, piece))
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_pieces(
    files: Sequence[SourceFile], section: SourceSection, fractions: Sequence[float]
) -> Iterator[tuple[str, Piece]]:
    """Every piece of the files' text with the split it belongs to."""
    for file in files:
        for piece in read_pieces(file, section):
            yield file.split or choose_split(piece.document, fractions), piece


def total_facts(shards: Sequence[Shard]) -> dict[str, dict[str, Any]]:
    """Counts by split over all shards."""
    totals = _no_facts()
    for shard in shards:
        for name, counts in (shard.facts() or {}).items():
            for kind, count in counts.items():
                totals[name][kind] += count
    return totals
