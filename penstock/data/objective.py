"""What a sample asks of the model: the next token or masked ones, and what each position sees.

The loader applies it to every row. It must never know about batches, models or devices.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.data.masking import Masking
from penstock.data.samples import Row
from penstock.data.training_data import TrainingData
from penstock.errors import DataError


class Task(NamedTuple):
    """One sample as the model is given it; all (T,)."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    segments: NDArray[np.int64]
    """Positions with equal numbers may see each other; padding has -1."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Predicting the next token, unless there is masking, of what positions may see."""

    by_document: int | None = None
    """The end-of-text token, where attention is confined to documents."""
    masking: Masking | None = None

    @property
    def takes_segments(self) -> bool:
        """Whether the model is told which positions belong together."""
        return self.by_document is not None or self.masking is not None

    def of(self, row: Row, position: int) -> Task:
        """The task that a row sets at its position in the run.

        Confined to documents, nothing is predicted from another one: weight 0.
        """
        segments = segments_of(row.tokens, row.length, self.by_document)
        if self.masking is not None:
            inputs, weights = self.masking.mask(row.tokens, row.length, position)
            return Task(inputs, row.tokens, weights, segments)
        weights = row.weights
        if self.by_document is not None:
            weights = np.where(row.tokens == self.by_document, np.float32(0), weights)
        return Task(row.tokens, row.targets, weights, segments)


def objective_for(
    data: TrainingData, *, is_causal: bool, by_document: bool, probability: float, seed: int
) -> Objective:
    """What data ask of a model that sees only what is before, or of one that sees both ways.

    Raises:
        DataError: a tokenizer without a mask token for a model that fills in masked ones.
    """
    end = data.end_of_text if by_document else None
    if is_causal:
        return Objective(end)
    tokenizer = data.tokenizer()
    if tokenizer.masked is None:
        raise DataError(
            f"the tokenizer of {data.path} has no mask token",
            where="data.path",
            do="prepare the data with the model's own tokenizer, or with tokenizer.kind=roberta",
        )
    masking = Masking(
        mask_token=tokenizer.masked.mask,
        special_tokens=tokenizer.special_ids,
        vocab_size=tokenizer.vocab_size,
        probability=probability,
        seed=seed,
    )
    return Objective(end, masking)


def segments_of(
    tokens: NDArray[np.int64], length: int, end_of_text: int | None
) -> NDArray[np.int64]:
    """Numbers (T,) int64 of the documents of `length` tokens, and -1 for the padding after them.

    A document ends with its end-of-text token, as in Megatron-LM's `reset_attention_mask`; None:
    all is one document.
    """
    segments = np.zeros(len(tokens), np.int64)
    if end_of_text is not None:
        segments[1:] = np.cumsum(tokens[:-1] == end_of_text)
    segments[length:] = -1
    return segments
