"""Raw text to a dataset folder: list, train or load the tokenizer, tokenize, merge.

`api.prepare` calls `prepare`. Interrupted work goes on where it stopped; what has not changed is
reused. It must never know about models.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from penstock.config.cleaning import CleanSection
from penstock.config.data import (
    DataSection,
    PrepareSection,
    RaySection,
    SourceSection,
    TokenizerSection,
)
from penstock.console import Console, get_console
from penstock.data.chat import ChatTemplate
from penstock.data.cluster import run_on_ray
from penstock.data.dataset import TOKENIZER, Dataset
from penstock.data.encode import article_rules
from penstock.data.outputs import check_output, find_duplicates, manifest_name, write_dataset
from penstock.data.packing import parse_packing
from penstock.data.sources import SOURCES
from penstock.data.sources.files import SourceFile
from penstock.data.sources.piece import READ
from penstock.data.splits import assign_splits, choose_split
from penstock.data.tokenize import (
    CHAT,
    Engine,
    Job,
    make_shards,
    run_here,
    split_pieces,
    tokenize_shards,
    total_facts,
)
from penstock.data.tokenizer import Tokenizer
from penstock.errors import ConfigError, DataError
from penstock.files import atomic_write, canonical_json

_WORK = ".prepare"
_PREPARE_VERSION = 4
"""Raised when the same input would give other bytes."""
_TRAINING_BYTES = 256 << 20
"""Text a tokenizer is trained on at most; a stable sample of the documents beyond."""


_SHARDS, _SMALLEST_SHARD, _LARGEST_SHARD = 64, 1 << 20, 64 << 20
_NOTHING = CleanSection()
"""Cleaning that changes nothing."""
_THIS_MACHINE = RaySection()


@dataclasses.dataclass(frozen=True)
class PrepareResult:
    """What `prepare` made or found."""

    dataset: Dataset
    reused: bool
    """Whether nothing had to be done."""
    seconds: float

    def json(self) -> dict[str, Any]:
        """The manifest, and whether it was reused."""
        return {**self.dataset.json(), "reused": self.reused, "seconds": round(self.seconds, 3)}

    def show(self, console: Console) -> None:
        """Counts by split, and where the dataset is."""
        self.dataset.show(console)
        console.path("dataset (reused, unchanged)" if self.reused else "dataset", self.dataset.path)


def prepare(
    source: SourceSection,
    tokenizer: TokenizerSection,
    data: DataSection,
    work: PrepareSection,
    seed: int = 0,
    cleaning: CleanSection = _NOTHING,
    ray: RaySection = _THIS_MACHINE,
) -> PrepareResult:
    """Make the dataset folder `data.path`, or find it made already; `seed` is the shuffle's.

    Raises:
        DataError: no text, unreadable or binary files, bad encoding, too little text.
        ConfigError: settings that contradict each other.
    """
    started = time.monotonic()
    if data.path is None:
        raise ConfigError("no dataset folder", where="data.path", do="set data.path=FOLDER")
    check_output(data)
    source = resolve_source(source, data)
    _check_categories(source, data)
    folder = Path(data.path)
    files = assign_splits(SOURCES[source.kind].files(source), source, data.splits)
    if sum(file.size for file in files) == 0:
        raise DataError("the source has no text", where="source", do="check source.path")
    key = _key(source, tokenizer, data, files, seed, cleaning)
    found = _existing(folder, manifest_name(data), key)
    if found is not None:
        return PrepareResult(found, True, time.monotonic() - started)
    shard_bytes = work.shard_bytes or _shard_bytes(files)
    # Absolute: processes on other machines stand elsewhere.
    work_folder = folder.absolute() / _WORK / f"{key[:16]}-{shard_bytes}"
    work_folder.mkdir(parents=True, exist_ok=True)
    job = Job(source, tuple(data.splits), cleaning, str(work_folder))
    tokens = _tokenizer(tokenizer, job, files)
    shards = make_shards(
        files, source, shard_bytes, work_folder, cleaning=cleaning, unpack=work_folder
    )
    tokenize_shards(shards, job, _engine(work, ray))
    totals = total_facts(shards)
    provenance = {"source": source.model_dump(), "clean": cleaning.model_dump(), "key": key}
    rules = article_rules(source)
    find_duplicates(shards, totals, cleaning, work_folder)
    _say(totals.tally, totals.places)
    write_dataset(folder, work_folder, shards, tokens, data, totals, rules, seed, provenance)
    shutil.rmtree(folder / _WORK)
    return PrepareResult(
        Dataset.open(folder, name=manifest_name(data)), False, time.monotonic() - started
    )


def _check_categories(source: SourceSection, data: DataSection) -> None:
    """Categories are of records, and only SambaNova's files hold them."""
    if source.category_key is None:
        if source.categories is not None:
            raise ConfigError(
                "categories are named, but no field that has them",
                where="source.categories",
                do="set source.category_key",
            )
        return
    if not SOURCES[source.kind].records:
        what = f"source.kind={source.kind} has no records"
    elif data.format != "sambanova":
        what = f"data.format={data.format} holds no categories"
    else:
        return
    raise ConfigError(
        what, where="source.category_key", do="leave it out; it is for data.format=sambanova"
    )


def _shard_bytes(files: Sequence[SourceFile]) -> int:
    """Units small enough that no worker is left with one alone for long, and not too many."""
    return min(_LARGEST_SHARD, max(_SMALLEST_SHARD, sum(file.size for file in files) // _SHARDS))


def _engine(work: PrepareSection, ray: RaySection) -> Engine:
    """What works through the shards."""
    if work.engine == "ray":
        return functools.partial(run_on_ray, workers=work.workers, address=ray.address)
    return functools.partial(run_here, workers=work.workers or os.cpu_count() or 1)


def resolve_source(source: SourceSection, data: DataSection) -> SourceSection:
    """The source with what was not given decided: SambaNova's tool reads text by the line."""
    lines = data.format == "sambanova" and source.kind == "text"
    return source.model_copy(
        update={
            "documents": source.documents or ("line" if lines else "file"),
            "keep_newlines": lines if source.keep_newlines is None else source.keep_newlines,
        }
    )


def _say(tally: dict[str, int], places: Sequence[str]) -> None:
    """What was read, what was left out or mended, and where the first cases of that are."""
    for what in sorted(tally, key=lambda name: name not in READ):
        tell = get_console().info if what in READ else get_console().warning
        tell(f"{tally[what]:,} {what}")
    for place in places:
        get_console().info(f"  {place}")


def _key(
    source: SourceSection,
    tokenizer: TokenizerSection,
    data: DataSection,
    files: Sequence[SourceFile],
    seed: int,
    cleaning: CleanSection,
) -> str:
    """Hash of everything the dataset's bytes depend on; files by name, size and time."""
    rows = parse_packing(data.packing).kind != "full" or data.format != "megatron"
    settings = {
        "version": _PREPARE_VERSION,
        "source": source.model_dump(),
        "clean": cleaning.model_dump(),
        "tokenizer": tokenizer.model_dump(),
        "data": data.model_dump(include={"packing", "format", "splits", "files", "shuffle"}),
        "length": data.sequence_length if rows else None,
        "seed": seed if data.shuffle else None,
        "files": [dataclasses.asdict(file) for file in files],
        "from": _folder_state(tokenizer.from_),
    }
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()


def _folder_state(folder: str | None) -> list[list[Any]]:
    """Name, size and time of a tokenizer folder's files."""
    if folder is None or not Path(folder).is_dir():
        return []
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _existing(folder: Path, name: str, key: str) -> Dataset | None:
    """The dataset in `folder` if it is whole and was made from exactly this."""
    if not (folder / name).is_file():
        return None
    try:
        dataset = Dataset.open(folder, name=name)
    except DataError as error:
        get_console().warning(f"{error}; preparing it again")
        return None
    return dataset if dataset.manifest.get("key") == key else None


def _tokenizer(section: TokenizerSection, job: Job, files: Sequence[SourceFile]) -> Tokenizer:
    """Train or load the tokenizer, or take the one an interrupted run has left."""
    saved = Path(job.folder) / TOKENIZER
    if saved.is_file():
        return Tokenizer.load(saved)
    if section.from_ is not None:
        tokenizer = Tokenizer.load(section.from_, section.bos)
    elif section.train:
        with get_console().stage(f"training a tokenizer of {section.vocab_size:,} tokens"):
            text = _training_text(job, files)
            tokenizer = Tokenizer.train(text, section.vocab_size, section.kind)
    else:
        raise ConfigError(
            "no tokenizer was named",
            where="tokenizer",
            do="set tokenizer.train=true, or tokenizer.from=FOLDER",
        )
    chat = ChatTemplate.find(section.from_)
    if chat is not None:
        atomic_write(Path(job.folder) / CHAT, chat.json())
    tokenizer.save(saved)
    return tokenizer


def _training_text(job: Job, files: Sequence[SourceFile]) -> Iterator[str]:
    """Text of the train split, thinned out evenly by document when there is very much."""
    share = min(1.0, _TRAINING_BYTES / max(1, sum(file.size for file in files)))
    for split, piece in split_pieces(files, job.source, job.fractions, None, job.cleaning):
        thinned = choose_split(f"tokenizer/{piece.document}", (share, 0.0, 1.0 - share))
        if split == "train" and thinned == "train":
            yield piece.text
