"""What training asks of its data, whatever kind it is: a dataset, a mixture, a stream.

`train_run.py` works with this protocol. It must never know how the data is stored.
"""

from pathlib import Path
from typing import Protocol

from penstock.data.samples import HeldOut, Samples
from penstock.data.tokenizer import Tokenizer


class TrainingData(Protocol):
    """Samples to train on and to validate with, and their tokenizer."""

    @property
    def path(self) -> Path:
        """Where it is, for messages."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens of its tokenizer."""
        ...

    @property
    def end_of_text(self) -> int:
        """Its tokenizer's end-of-text token."""
        ...

    @property
    def tokenizer_sha256(self) -> str:
        """Identity of its tokenizer."""
        ...

    @property
    def sequence_length(self) -> int | None:
        """Tokens per sequence it was prepared for, where one was given."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was made with."""
        ...

    def training(self, split: str, sequence_length: int, seed: int) -> Samples:
        """The samples of a split, in an order of `seed`."""
        ...

    def validation(self, split: str, sequence_length: int, limit: int | None) -> list[HeldOut]:
        """A fixed choice of at most `limit` samples of each part that has any."""
        ...

    def announce(self, split: str, sequence_length: int) -> None:
        """Say what will be trained on, where that is more than one dataset."""
        ...
