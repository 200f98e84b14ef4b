"""The sections of the configuration that say what text becomes what dataset.

`config/schema.py` gathers them. It must never know what reads or writes a dataset.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from penstock.config.section import PositiveShare, Section, Share


def _as_texts(value: Any) -> Any:  # noqa: ANN401 - what a user has given
    """A list's numbers and paths as text; everything else as it is."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else value


class SourceSection(Section):
    """What `prepare` reads."""

    kind: Literal["stdlib", "text"] = "text"
    """stdlib: the Python standard library's own source; text: the user's files."""
    path: str | list[str] | None = None
    """File, folder or glob (or a list of them) for kind=text: plain text, .gz or .zst."""
    documents: Literal["file", "line", "blank_line"] = "file"
    """What one document is: a whole file, a line, or a paragraph between blank lines."""
    on_error: Literal["replace", "skip", "stop"] = "stop"
    """On bytes that are not UTF-8: put U+FFFD, leave the file out, or stop and name the offset."""


class TokenizerSection(Section):
    """Where the tokenizer comes from."""

    from_: str | None = Field(default=None, alias="from")
    """Folder with tokenizer.json, or vocab.json + merges.txt; or a hub name where a network is."""
    train: bool = False
    """Train a byte-level BPE tokenizer on the train split."""
    vocab_size: int = Field(default=8192, ge=257)
    """Vocabulary to train, in tokens, the end-of-text token included."""


class DataSection(Section):
    """The dataset: where it is and how sequences are cut from it."""

    path: str | None = None
    """Dataset folder: written by `prepare`, read by the other verbs."""
    mixture: Annotated[list[str] | None, BeforeValidator(_as_texts)] = None
    """Datasets to train on together, instead of data.path: weights and folders in turn, as in
    [0.7,A,0.3,B], or folders alone, in proportion to their size. Any known format."""
    sequence_length: int | None = Field(default=None, ge=1)
    """Tokens per sequence."""
    packing: str = "full"
    """full: documents back to back, cut anywhere; greedy::drop|truncate_left|truncate_right: whole
    documents per sequence, padded; single::drop|truncate_left|truncate_right: one per sequence."""
    attention: Literal["full", "document"] = "full"
    """What a position sees of its sequence: all (of what is before it, in causal models), or its
    own document alone, where positions start again at 0. A document ends with its end-of-text
    token."""
    format: Literal[
        "megatron",
        "sambanova",
        "cerebras",
        "tfrecord",
        "parquet",
        "arrow",
        "jsonl",
        "pickle",
        "npy",
        "llmc",
        "nanogpt",
    ] = "megatron"
    """Storage format to write: `convert dataset` writes every one, `prepare` writes megatron."""
    splits: tuple[PositiveShare, Share, Share] = (0.9, 0.05, 0.05)
    """Fractions of the documents for train (not 0), validation and test, by a stable hash."""
    split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split for the periodic evaluation during training."""
    verify: Literal["size", "checksum"] = "checksum"
    """How files are checked on opening: by size alone, or by size and SHA-256 (cached)."""


class PrepareSection(Section):
    """How `prepare` works."""

    workers: int | None = Field(default=None, ge=1)
    """Processes; all cores when not given. The bytes written do not depend on it."""
    shard_bytes: int = Field(default=16_777_216, ge=1024)
    """Text per unit of work and of resuming, in bytes."""
