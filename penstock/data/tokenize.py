"""Tokenize shards of the source into Megatron files, in worker processes, resumably.

`data/prepare.py` calls `tokenize_shards`. A shard's output depends on its files alone, so the
number of workers and interruptions leave no trace in the bytes.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.config.cleaning import CleanSection
from penstock.config.data import SourceSection
from penstock.console import get_console
from penstock.data.chat import ChatTemplate
from penstock.data.clean import clean, judges
from penstock.data.dataset import TOKENIZER
from penstock.data.encode import Encoder, text_roles
from penstock.data.formats.megatron import Writer, token_dtype
from penstock.data.sources import SOURCES, read_documents
from penstock.data.sources.files import SourceFile
from penstock.data.sources.piece import Piece, Tally
from penstock.data.splits import SPLITS, choose_split
from penstock.data.tokenizer import Tokenizer
from penstock.files import atomic_write
from penstock.workers import worker_pool

_BATCH_CHARACTERS = 1 << 20
_FACTS = "facts.json"
CHAT = "chat_template.json"
CATEGORIES = "_categories"
"""SPLIT_categories beside SPLIT holds a category for each token, where they are asked for."""
ROLES = "_roles"
"""SPLIT_roles beside SPLIT holds a role for each token, where a document has a prompt."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What every shard's tokens depend on beside its files; small, and the same for all."""

    source: SourceSection
    fractions: tuple[float, ...]
    """Shares of train, validation and test."""
    cleaning: CleanSection
    folder: str
    """Where the tokenizer and the chat template lie."""

    def encoder(self) -> Encoder:
        """Load the tokenizer and the template."""
        folder = Path(self.folder)
        chat = folder / CHAT
        template = ChatTemplate.from_json(chat.read_text("utf-8")) if chat.is_file() else None
        return Encoder(Tokenizer.load(folder / TOKENIZER), self.source, template)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A unit of work: some files, and where their tokens go."""

    index: int
    files: tuple[SourceFile, ...]
    folder: str

    def facts(self) -> dict[str, Any] | None:
        """Counts by split and what went wrong, once the shard is done."""
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
    files: Sequence[SourceFile],
    section: SourceSection,
    shard_bytes: int,
    folder: Path,
    *,
    cleaning: CleanSection | None = None,
    unpack: Path | None = None,
) -> list[Shard]:
    """Group consecutive files, or ranges of large ones, into shards of about `shard_bytes`.

    `unpack`: a folder for what cannot be cut in place; without one such files stay whole, as do
    those that are a document each where cleaning judges documents.
    """
    source = SOURCES[section.kind]
    by_file = section.documents in (None, "file") and section.kind in ("text", "stdlib")
    whole = by_file and cleaning is not None and judges(cleaning)
    groups: list[list[SourceFile]] = []
    room = 0
    for file in files:
        parts = [file] if whole else source.cut(file, section, shard_bytes, unpack)
        for part in parts:
            if room <= 0:
                groups.append([])
                room = shard_bytes
            groups[-1].append(part)
            room -= part.size
    return [Shard(i, tuple(g), str(folder / f"shard-{i:06}")) for i, g in enumerate(groups)]


Engine = Callable[[Sequence[Shard], Job], Iterator[Shard]]
"""Works through shards, in any order and wherever it likes, and yields each when done."""


def tokenize_shards(shards: Sequence[Shard], job: Job, run: Engine) -> None:
    """Tokenize every shard not done yet through an engine. The first error stops the rest."""
    missing = [shard for shard in shards if shard.facts() is None]
    done = sum(shard.bytes for shard in shards) - sum(shard.bytes for shard in missing)
    if done:
        get_console().info(f"{len(shards) - len(missing)} of {len(shards)} shards were done before")
    total = sum(shard.bytes for shard in shards)
    with get_console().progress("tokenizing", total) as progress:
        progress.advance(done)
        for shard in run(missing, job) if missing else ():
            progress.advance(shard.bytes, text=f"{progress.done / 2**20:.0f} MiB")


def run_here(shards: Sequence[Shard], job: Job, workers: int) -> Iterator[Shard]:
    """Work through the shards, here when one process is enough, and yield each when done."""
    workers = min(workers, len(shards))
    if workers <= 1:
        encoder = job.encoder()
        for shard in shards:
            tokenize_shard(shard, job, encoder)
            yield shard
        return
    with worker_pool(workers, _prepare_worker, (job,)) as pool:
        tasks = {pool.submit(_work, shard, job): shard for shard in shards}
        for task in concurrent.futures.as_completed(tasks):
            task.result()
            yield tasks[task]


_worker_encoder: list[Encoder] = []


def _prepare_worker(job: Job) -> None:
    """Load the tokenizer once per process; one thread each, as there is a process per core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder[:] = [job.encoder()]


def _work(shard: Shard, job: Job) -> None:
    tokenize_shard(shard, job, _worker_encoder[0])


def tokenize_shard(shard: Shard, job: Job, encoder: Encoder) -> None:
    """Write one shard's tokens by split, and their roles; its facts come last and make it count.

    Raises:
        DataError: what `source.on_error` does not pass over.
    """
    folder = Path(shard.folder)
    facts, tally = _no_facts(), Tally()
    with_roles = SOURCES[job.source.kind].records
    prompted = False
    with contextlib.ExitStack() as stack:
        dtype = token_dtype(encoder.tokenizer.vocab_size)
        writers = {name: stack.enter_context(Writer(folder / name, dtype)) for name in SPLITS}
        roles = {
            name: stack.enter_context(Writer(folder / (name + ROLES), np.dtype(np.uint8)))
            for name in (SPLITS if with_roles else ())
        }
        categories = {
            name: stack.enter_context(Writer(folder / (name + CATEGORIES), np.dtype(np.int32)))
            for name in (SPLITS if job.source.category_key is not None else ())
        }
        pieces = split_pieces(shard.files, job.source, job.fractions, tally, job.cleaning)
        for batch in batches(pieces):
            encoded = encoder.encode([piece for _, piece in batch], tally)
            for (split, piece), sequences in zip(batch, encoded, strict=True):
                for sequence in sequences:
                    writers[split].append(sequence.tokens, ends=piece.ends)
                    if with_roles:
                        prompted |= sequence.roles is not None
                        whole = text_roles(sequence, piece.ends)
                        roles[split].append(np.asarray(whole.roles), ends=piece.ends)
                    if sequence.categories is not None:
                        categories[split].append(sequence.categories, ends=piece.ends)
                if sequences:
                    _count(facts[split], piece)
    result = {
        "splits": facts,
        "tally": tally.counts,
        "places": tally.places,
        "prompted": prompted,
    }
    atomic_write(folder / _FACTS, json.dumps(result))


def _no_facts() -> dict[str, dict[str, Any]]:
    return {name: {"documents": 0, "text_bytes": 0, "words": 0} for name in SPLITS}


def _count(facts: dict[str, int], piece: Piece) -> None:
    facts["documents"] += piece.ends
    facts["text_bytes"] += len(piece.text.encode())
    facts["words"] += len(piece.text.split())


def batches(pieces: Iterable[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    """Pieces with their splits, about a million characters at a time."""
    batch: list[tuple[str, Piece]] = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_pieces(
    files: Sequence[SourceFile],
    section: SourceSection,
    fractions: Sequence[float],
    tally: Tally | None = None,
    cleaning: CleanSection | None = None,
) -> Iterator[tuple[str, Piece]]:
    """Every piece of the files' documents that cleaning leaves, with the split it belongs to."""
    tally = Tally() if tally is None else tally
    for file in files:
        pieces = read_documents(file, section, tally)
        for piece in pieces if cleaning is None else clean(pieces, cleaning, tally):
            yield file.split or choose_split(piece.document, fractions), piece


@dataclasses.dataclass(frozen=True)
class Totals:
    """What all shards hold together."""

    splits: dict[str, dict[str, Any]]
    """Counts by split."""
    tally: dict[str, int]
    """What was left out or mended."""
    places: tuple[str, ...]
    """Where the first cases of that are."""
    prompted: bool
    """Whether some document has a prompt, so that tokens have roles."""
    left_out: dict[str, NDArray[np.bool_]] = dataclasses.field(default_factory=dict)
    """By split, which documents are like others and left out."""


def total_facts(shards: Sequence[Shard]) -> Totals:
    """Add up the facts of all shards."""
    splits, tally = _no_facts(), Tally()
    prompted = False
    for shard in shards:
        facts = shard.facts() or {"splits": {}, "tally": {}, "places": [], "prompted": False}
        for name, counts in facts["splits"].items():
            for kind, count in counts.items():
                splits[name][kind] += count
        tally.counts.update(facts["tally"])
        tally.places += facts["places"]
        prompted |= facts["prompted"]
    return Totals(splits, dict(sorted(tally.counts.items())), tuple(tally.places[:5]), prompted)
