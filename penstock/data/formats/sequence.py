"""What every format has in common: token sequences with loss weights, their readers and writers.

Each module of this package implements these protocols for one format; `registry.py` finds the
right one, `data/convert.py` joins a reader to a writer. It must never know any file layout.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError

PROMPT, COMPLETION, PADDING, SEPARATOR = range(4)
"""Roles of tokens, numbered as SambaNova's `token_type_ids`; a separator ends an article."""
LARGEST_ID = 2**31 - 1
"""Token ids are int32 wherever they are stored widest."""
LARGEST_BYTES = 256 << 20
"""One record, row block or line may take this much memory; what claims more is refused."""
_BLOCK = 1 << 20
"""Tokens checked at a time, so that a memory-mapped stream of any length can be."""


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """One stored sequence, without padding."""

    tokens: NDArray[Any]
    """(N,), integers; may be memory-mapped."""
    weights: NDArray[np.float32] | None = None
    """(N,), loss weight of each token as a target; None: every token weighs 1."""
    roles: NDArray[np.uint8] | None = None
    """(N,), PROMPT, COMPLETION, PADDING or SEPARATOR, where the format knows."""
    categories: NDArray[np.int32] | None = None
    """(N,), category of each token, -1 for none; only SambaNova's files hold them."""

    def loss_weights(self) -> NDArray[np.float32]:
        """The weights, spelt out where they are all 1."""
        return np.ones(len(self.tokens), np.float32) if self.weights is None else self.weights


def weights_or_none(weights: NDArray[Any]) -> NDArray[np.float32] | None:
    """Weights as float32, or None when every token weighs 1."""
    return None if bool((weights == 1).all()) else np.asarray(weights, np.float32)


def begun(sequence: TokenSequence, token: int) -> TokenSequence:
    """The sequence behind one more token, which is asked, not learnt: weight 0, a prompt's role."""
    weights, roles, categories = sequence.weights, sequence.roles, sequence.categories
    weights = np.ones(len(sequence.tokens), np.float32) if weights is None else weights
    return TokenSequence(
        np.concatenate([np.array([token], sequence.tokens.dtype), sequence.tokens]),
        np.concatenate([np.zeros(1, np.float32), weights]),
        None if roles is None else np.concatenate([np.array([PROMPT], np.uint8), roles]),
        None if categories is None else np.concatenate([categories[:1], categories]),
    )


def roles_of(sequence: TokenSequence, separator: int) -> NDArray[np.uint8]:
    """Its roles; where a format has none, those its weights imply."""
    return implied_roles(sequence, separator) if sequence.roles is None else sequence.roles


def implied_roles(sequence: TokenSequence, separator: int) -> NDArray[np.uint8]:
    """Completions weigh and prompts do not; a last token that weighs and is `separator` is one."""
    roles = np.where(sequence.loss_weights() > 0, COMPLETION, PROMPT).astype(np.uint8)
    if len(roles) and roles[-1] == COMPLETION and int(sequence.tokens[-1]) == separator:
        roles[-1] = SEPARATOR
    return roles


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a reader can tell without reading everything."""

    sequences: int | None
    """None: known only once all has been read."""
    tokens: int | None
    """Stored elements, padding included; None: known only once all has been read."""
    dtype: str
    """How a token is stored."""
    width: int | None = None
    """Elements of each row, in formats of fixed width."""
    vocab_size: int | None = None
    """Vocabulary, where a file beside the data names it."""
    padding: int | None = None
    """Padding id, where it is known."""
    notes: tuple[str, ...] = ()
    """What was decided from the data and should be said."""


class Reader(Protocol):
    """One or several files of one format, checked on opening; sequences in bounded memory."""

    facts: Facts

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield every sequence in order.

        Raises:
            DataError: the data is damaged further in.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a split's sequences were packed from."""

    documents: int
    """Documents that had tokens to pack; a dialogue is one."""
    tokens: int
    """Tokens of these."""
    dropped: int
    """Tokens that packing cut off or left out because a document was longer than a row."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a writer needs to know before the first sequence."""

    width: int
    """Elements of each row, in formats of fixed width; no sequence is longer."""
    sequences: int = 0
    """How many there will be, for headers that state it."""
    tokens: int = 0
    """Tokens of all sequences together."""
    equal: bool = False
    """Every sequence is `width` long."""
    padding: int = 0
    """Id rows are padded with."""
    vocab_size: int | None = None
    """Vocabulary, where it is known."""
    largest: int = LARGEST_ID
    """No token id is above this."""
    weights: bool = False
    """Some token weighs other than 1."""
    roles: bool = False
    """Some sequence has roles."""
    categories: bool = False
    """Some token has a category."""
    packed: bool = False
    """Several whole sequences a row, where the format can mark their borders."""
    file: int = 0
    """Which of the split's files this is; they are written in order."""
    files: int = 1
    """Files of the split, where the format has several."""
    origin: Origin | None = None
    """What all the split's files were packed from, where that is known."""


class Writer(Protocol):
    """One split on its way to disk; nothing has its name before `finish`."""

    def append(self, sequence: TokenSequence) -> None:
        """Add one sequence."""
        ...

    def finish(self) -> list[Path]:
        """Make everything durable, give files their names, and return these."""
        ...

    def abandon(self) -> None:
        """Remove what was written so far."""
        ...


class Joined:
    """Several readers of one format, one after another."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        """Take readers of at least one file."""
        self.readers = readers
        facts = [reader.facts for reader in readers]
        self.facts = dataclasses.replace(
            facts[0],
            sequences=_total([f.sequences for f in facts]),
            tokens=_total([f.tokens for f in facts]),
            width=max((f.width for f in facts if f.width is not None), default=None),
            notes=tuple(dict.fromkeys(note for f in facts for note in f.notes)),
        )

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield the sequences of each reader."""
        for reader in self.readers:
            yield from reader.sequences()


def _total(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)


def check_sequence(sequence: TokenSequence, where: str, largest: int = LARGEST_ID) -> None:
    """Refuse ids outside 0 to `largest`, weights that are no finite numbers from 0, odd lengths.

    Raises:
        DataError: any of these.
    """
    tokens, weights = sequence.tokens, sequence.weights
    for first in range(0, len(tokens), _BLOCK):
        block = tokens[first : first + _BLOCK]
        if int(block.min()) < 0 or int(block.max()) > largest:
            bad = int(block.min()) if int(block.min()) < 0 else int(block.max())
            raise damaged(where, f"holds {bad}, which is no token id from 0 to {largest}")
    for name, values in (("loss weights", weights), ("roles", sequence.roles)):
        if values is not None and len(values) != len(tokens):
            raise damaged(where, f"has {len(tokens)} tokens but {len(values)} {name}")
    if weights is not None and not bool((np.isfinite(weights) & (weights >= 0)).all()):
        raise damaged(where, "has loss weights that are no numbers from 0 upwards")


def damaged(where: object, how: str, do: str = "copy or make the file again") -> DataError:
    """Compose the error for a file that is not what it should be; `how` goes on from its name."""
    return DataError(f"{where} {how}", where=str(where), do=do)
