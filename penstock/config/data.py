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

    kind: Literal["stdlib", "text", "jsonl", "csv", "parquet", "wikipedia", "hub", "generated"] = (
        "text"
    )
    """text: plain; jsonl, csv, parquet: a record a line or row; wikipedia: a MediaWiki XML dump, or
    WikiExtractor's folders; hub: a Hugging Face data set; stdlib: Python's own source; generated:
    random words, to measure speed."""
    path: str | list[str] | None = None
    """File, folder or glob (or a list of them): plain, .gz, .bz2, .xz or .zst; kind=hub: a name, or
    a local folder in the hub's layout or saved by `datasets`."""
    name: str | None = None
    """Configuration of a kind=hub data set, where it has several."""
    documents: Literal["file", "line", "blank_line"] | None = None
    """What one document of kind=text is: a whole file (when not given), a line (when not given for
    data.format=sambanova), or a paragraph between blank lines."""
    keep_newlines: bool | None = None
    """Whether documents=line keeps each line's newline; only for data.format=sambanova when not
    given, whose own tool does."""
    encoding: str | None = None
    """Encoding of text, jsonl and csv; UTF-8, UTF-16 or UTF-32 by their marks when not given."""
    on_error: Literal["replace", "skip", "stop"] = "stop"
    """On bytes that are not of the encoding, or a broken record: put U+FFFD, leave out the file or
    record and count it, or stop and name the place. A record that replacing does not mend is left
    out."""
    text_key: str = "text"
    """Field of a record that holds a document's text."""
    prompt_key: str = "prompt"
    """Field of a record that holds a prompt; it may be missing beside a completion."""
    completion_key: str = "completion"
    """Field of a record that holds a completion; a record may be a list of such pairs."""
    messages_key: str = "messages"
    """Field of a record that holds a chat, laid out by the tokenizer's own chat template."""
    category_key: str | None = None
    """Field of a record, or of each of its pairs, that numbers its category, for category_ids in
    data.format=sambanova (whose own tool calls the field category); -1 where it is missing."""
    categories: list[str] | None = None
    """Names of the categories, in the order of their numbers from 0, where that field has names."""
    packing_boundary: Literal["document", "pair"] = "document"
    """What packing keeps whole: a document with all its pairs, or each pair of prompt and
    completion."""
    attention_boundary: Literal["document", "pair"] = "document"
    """Where data.format=sambanova has its separators, which bound attention there: at the end of a
    document, or of each pair."""
    keep_prompt_only: bool = False
    """Whether pairs and rows without a completion are kept."""
    prompt_weight: float = Field(default=0.0, ge=0)
    """Loss weight of a prompt's tokens; a completion's weigh 1, padding 0."""
    prompt_prefix: str = ""
    """Text put before each prompt; a completion without a prompt gets none."""
    prompt_postfix: str = ""
    """Text put behind each prompt, as prompt_prefix before it."""
    one_space: bool = True
    """Whether exactly one space stands before each completion, whatever the record has."""
    page_seconds: float = Field(default=30.0, gt=0)
    """Seconds for the markup of one page of kind=wikipedia; beyond, simpler rules strip it."""


class TokenizerSection(Section):
    """Where the tokenizer comes from."""

    from_: str | None = Field(default=None, alias="from")
    """Folder with tokenizer.json, vocab.json + merges.txt, vocab.txt or tokenizer.model; or a hub
    name where there is a network."""
    train: bool = False
    """Train a tokenizer on the train split."""
    kind: Literal["gpt2", "roberta", "bert"] = "gpt2"
    """What to train: byte-level BPE with GPT-2's one special token, or with RoBERTa's, which masked
    models need; or BERT's word pieces in lower case."""
    vocab_size: int = Field(default=8192, ge=257)
    """Vocabulary to train, in tokens, the end-of-text token included."""
    bos: bool | None = None
    """Whether a token (Llama's <s>) begins every document and prompt; as the tokenizer's own
    settings have it when not given."""


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
    """Storage format `prepare` and `convert dataset` write."""
    splits: tuple[PositiveShare, Share, Share] = (0.9, 0.05, 0.05)
    """Fractions of the documents for train (not 0), validation and test, by a stable hash."""
    files: int = Field(default=1, ge=1)
    """Files of each split, where the format's own tool writes several: sambanova, cerebras,
    tfrecord, parquet, arrow."""
    group_by_length: bool = False
    """Whether steps are made of sequences of like length, and cut after the longest of them:
    for packings that pad, without kernels (compile.mode=off)."""
    shuffle: bool = False
    """Whether `prepare` shuffles each split's documents, by `seed`, before it packs them."""
    split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split for the periodic evaluation during training."""
    streaming: bool = False
    """Train straight from `source`, without a dataset: text is tokenized while training goes on."""
    shuffle_buffer: int = Field(default=1024, ge=1)
    """Sequences of a stream that are shuffled among each other."""
    lanes: int = Field(default=8, ge=1)
    """Places of the source a stream is read from at once; their samples take turns."""
    verify: Literal["size", "checksum"] = "checksum"
    """How files are checked on opening: by size alone, or by size and SHA-256 (cached)."""


class RaySection(Section):
    """The Ray cluster that `prepare.engine=ray` works on."""

    address: str | None = None
    """Where its head is, as in ray://HOST:10001 or HOST:6379, or auto; when not given, a cluster
    is started on this machine."""


class PrepareSection(Section):
    """How `prepare` works."""

    engine: Literal["local", "ray"] = "local"
    """Where: in processes of this machine, or on a Ray cluster, whose machines must all see the
    source and the dataset's folder. The bytes written are the same."""

    workers: int | None = Field(default=None, ge=1)
    """Processes; all cores when not given. The bytes written do not depend on it."""
    shard_bytes: int | None = Field(default=None, ge=1024)
    """Source per unit of work and of resuming, in bytes; when not given a 64th of the source, from
    1 to 64 MiB. The bytes written do not depend on it."""
