"""Training straight from raw text: tokenized and packed as it is needed, in the background.

`planning.py` opens a source here instead of a dataset. It must never know about models or devices.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.config.cleaning import CleanSection
from penstock.config.data import DataSection, SourceSection, TokenizerSection
from penstock.console import get_console
from penstock.data.chat import ChatTemplate
from penstock.data.encode import Encoder
from penstock.data.formats.sequence import PROMPT, TokenSequence, weights_or_none
from penstock.data.packing import parse_packing
from penstock.data.prepare import resolve_source
from penstock.data.samples import HeldOut, Row, SplitSamples
from penstock.data.sources import SOURCES
from penstock.data.sources.piece import Piece, Tally
from penstock.data.splits import SPLITS, assign_splits
from penstock.data.stream_rows import Cursor, StreamRow, StreamText, rows_from
from penstock.data.stream_samples import StreamSamples, padded_row
from penstock.data.tokenize import Shard, make_shards, split_pieces
from penstock.data.tokenizer import Tokenizer
from penstock.errors import ConfigError, DataError
from penstock.files import canonical_json

_NOTHING = CleanSection()
"""Cleaning that changes nothing."""
_SHARD_BYTES = 4 << 20
"""Text of a shard: what a lane goes through before it turns to text elsewhere."""


@dataclasses.dataclass(frozen=True)
class HeldOutRows:
    """Rows of the validation split, in memory."""

    name: str
    rows: Sequence[Row]
    packing: str

    @property
    def token_count(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)

    def samples(self, sequence_length: int) -> int:
        """How many rows there are."""
        return len(self.rows)

    def sample(
        self, index: int, sequence_length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Inputs, targets and loss weights of one row."""
        row = self.rows[index]
        return row.tokens, row.targets, row.weights

    def length(self, index: int, sequence_length: int) -> int:
        """How many inputs of a row are not padding."""
        return self.rows[index].length


@dataclasses.dataclass(frozen=True)
class TextStream:
    """Raw text to train on as it is."""

    source: SourceSection
    data: DataSection
    inner: Tokenizer
    chat: ChatTemplate | None
    """How the tokenizer lays out chats, where it says so."""
    shards: list[Shard]
    cleaning: CleanSection = _NOTHING
    """What is done to each document before it is tokenized."""

    @property
    def path(self) -> Path:
        """The first path of the source."""
        path = self.source.path
        return Path(path if isinstance(path, str) else path[0] if path else self.source.kind)

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.inner.vocab_size

    @property
    def end_of_text(self) -> int:
        """The tokenizer's end-of-text token."""
        return self.inner.end_of_text

    @property
    def tokenizer_sha256(self) -> str:
        """Identity of the tokenizer."""
        return self.inner.sha256

    @property
    def sequence_length(self) -> int | None:
        """None: rows are cut to any length."""
        return None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.inner

    def training(self, split: str, sequence_length: int, seed: int) -> StreamSamples:
        """The samples of a split."""
        text = self._text(split, sequence_length, seed)
        lanes = min(self.data.lanes, len(text.shards))
        settings = {
            "source": self.source.model_dump(exclude={"path"}),
            "files": [[file.id, file.size] for shard in self.shards for file in shard.files],
            "tokenizer": self.inner.sha256,
            "data": self.data.model_dump(include={"packing", "splits", "shuffle_buffer"}),
            "split": split,
            "lanes": lanes,
            "sequence_length": sequence_length,
            "seed": seed,
            **({"clean": self.cleaning.model_dump()} if self.cleaning != _NOTHING else {}),
        }
        identity = hashlib.sha256(canonical_json(settings).encode()).hexdigest()
        return StreamSamples(text, identity, lanes=lanes, buffer=self.data.shuffle_buffer)

    def validation(self, split: str, sequence_length: int, limit: int | None) -> list[HeldOut]:
        """The first `limit` rows of the split in the source's own order.

        Raises:
            ConfigError: no limit.
        """
        if limit is None:
            raise ConfigError(
                "a stream's validation split has no known end",
                where="train.evaluate_sequences",
                do="set train.evaluate_sequences to a number",
            )
        text = self._text(split, sequence_length, 0, shuffle=False)
        rows: list[Row] = []
        shares: dict[str, float] = dict(zip(SPLITS, self.data.splits, strict=True))
        if text.shards and shares.get(split, 1) > 0:
            for row in _one_pass(text):
                rows.append(padded_row(row.sequence, text))
                if len(rows) == limit:
                    break
        if not rows:
            get_console().warning(f"split {split} of the stream is too small: no validation")
            return []
        return [
            HeldOut(
                "", 1.0, SplitSamples(HeldOutRows(split, rows, self.data.packing), sequence_length)
            )
        ]

    def announce(self, split: str, sequence_length: int) -> None:
        """How much text there is."""
        size = sum(shard.bytes for shard in self.shards)
        get_console().info(
            f"streaming {size / 2**20:,.0f} MiB of text in {len(self.shards):,} shards, "
            f"{self.data.packing} packing"
        )

    def _text(
        self, split: str, sequence_length: int, seed: int, *, shuffle: bool = True
    ) -> StreamText:
        encoder = Encoder(self.inner, self.source, self.chat)

        def encode(pieces: Sequence[Piece], tally: Tally) -> list[list[TokenSequence]]:
            encoded = encoder.encode(pieces, tally)
            return [[_weighted(s, self.source.prompt_weight) for s in one] for one in encoded]

        shards = [s for s in self.shards if any(f.split in (None, split) for f in s.files)]
        return StreamText(
            shards=shards,
            read=lambda shard, tally: split_pieces(
                shard.files, self.source, self.data.splits, tally, self.cleaning
            ),
            encode=encode,
            end_of_text=self.inner.end_of_text,
            split=split,
            packing=parse_packing(self.data.packing),
            sequence_length=sequence_length,
            seed=seed,
            shuffle=shuffle,
        )


def _weighted(sequence: TokenSequence, prompt_weight: float) -> TokenSequence:
    """The sequence with the loss weights its roles mean."""
    if sequence.roles is None or sequence.weights is not None:
        return sequence
    weights = np.where(sequence.roles == PROMPT, np.float32(prompt_weight), np.float32(1))
    return TokenSequence(sequence.tokens, weights_or_none(weights))


def _one_pass(text: StreamText) -> Iterator[StreamRow]:
    """Rows until the shards have been gone through once; an unfinished last one is left out."""
    try:
        for row in rows_from(text, Cursor(0, 0, 0)):
            if row.after.shard >= len(text.shards):
                return
            yield row
    except DataError:
        return


def open_stream(
    source: SourceSection,
    tokenizer: TokenizerSection,
    data: DataSection,
    cleaning: CleanSection = _NOTHING,
) -> TextStream:
    """List the source and load the tokenizer.

    Raises:
        ConfigError: no tokenizer to load, or cleaning that must see all documents.
        DataError: no text.
    """
    for name in ("exact_duplicates", "near_duplicates"):
        if getattr(cleaning, name):
            raise ConfigError(
                "duplicates are found among all documents, and a stream has not read them",
                where=f"clean.{name}",
                do="leave it out, or `prepare` the dataset with it and train on that",
            )
    if tokenizer.from_ is None:
        raise ConfigError(
            "streaming needs a tokenizer that is there already",
            where="tokenizer.from",
            do="set tokenizer.from=FOLDER; `prepare tokenizer.train=true` makes one",
        )
    source = resolve_source(source, data)
    files = assign_splits(SOURCES[source.kind].files(source), source, data.splits)
    if sum(file.size for file in files) == 0:
        raise DataError("the source has no text", where="source", do="check source.path")
    shards = make_shards(files, source, _SHARD_BYTES, Path(), cleaning=cleaning)
    chat = ChatTemplate.find(tokenizer.from_)
    inner = Tokenizer.load(tokenizer.from_, tokenizer.bos)
    return TextStream(source, data, inner, chat, shards, cleaning)
