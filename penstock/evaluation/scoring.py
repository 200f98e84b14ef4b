"""How well a model predicts given tokens after given tokens: losses, and whether argmax hits.

Tasks ask a `Scorer`. It must never know about text or tasks.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.console import get_console
from penstock.errors import DataError
from penstock.models.transformer import Transformer

_CHUNK_LOGITS = 1 << 24
"""Logits at hand at once: 64 MiB in float32."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Tokens (N,) int64, of which the last `targets` are to be predicted from those before."""

    tokens: NDArray[np.int64]
    targets: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model makes of a request's targets."""

    losses: NDArray[np.float64]
    """Negative log-likelihood of each target, in nats."""
    hits: NDArray[np.bool_]
    """Whether each target is the likeliest token given all that stands before it."""

    @property
    def loss(self) -> float:
        """Sum over the targets, in nats."""
        return float(self.losses.sum())

    @property
    def all_hit(self) -> bool:
        """Whether greedy decoding would write exactly the targets."""
        return bool(self.hits.all())


class Scorer:
    """A causal model that answers requests, several at a time."""

    def __init__(
        self,
        model: Transformer,
        *,
        length: int,
        batch: int,
        is_fixed: bool,
        by_document: bool = False,
    ) -> None:
        """`length`: most tokens the model is given, `batch`: most rows.

        `is_fixed`: the model takes exactly (batch, length) tokens, as compiled kernels do;
        `by_document`: and the number of each token's document, here the same for all.
        """
        self._by_document = by_document
        self._model = model
        self.length = length
        self._batch = batch
        self._is_fixed = is_fixed
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def predict(self, requests: Sequence[Request], description: str) -> list[Prediction]:
        """Answer every request, in order; contexts that are too long lose their beginning.

        Raises:
            DataError: a request without context, or with more targets than the model takes.
        """
        for request in requests:
            self._check(request)
        # Rows of like length stand together, so that little is padded.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
        found: list[Prediction | None] = [None] * len(requests)
        with get_console().progress(description, len(requests)) as progress:
            for first in range(0, len(order), self._batch):
                chosen = order[first : first + self._batch]
                for index, answer in zip(
                    chosen, self._answers([requests[i] for i in chosen]), strict=True
                ):
                    found[index] = answer
                progress.advance(len(chosen))
        return [answer for answer in found if answer is not None]

    def _check(self, request: Request) -> None:
        if not 0 < request.targets < len(request.tokens):
            raise DataError(
                f"{request.targets} of {len(request.tokens)} tokens cannot be predicted from those "
                "before",
                where="evaluate.tasks",
                do="check the task's data",
            )
        if request.targets > self.length:
            raise DataError(
                f"a text to predict has {request.targets} tokens, the model takes {self.length}",
                where="evaluate.tasks",
                do="evaluate with a longer data.sequence_length, or another model",
            )

    def _answers(self, requests: Sequence[Request]) -> Iterator[Prediction]:
        """One device pass; padding stands after each row, where a causal model does not look."""
        rows = [request.tokens[-(self.length + 1) :] for request in requests]
        longest = self.length if self._is_fixed else max(len(row) for row in rows) - 1
        inputs = np.zeros((self._batch if self._is_fixed else len(rows), longest), np.int64)
        for place, row in enumerate(rows):
            inputs[place, : len(row) - 1] = row[:-1]
        tokens = torch.from_numpy(inputs).to(self._device)
        segments = torch.zeros_like(tokens) if self._by_document else None
        hidden = self._model.hidden(tokens, segments)
        for place, (row, request) in enumerate(zip(rows, requests, strict=True)):
            first = len(row) - 1 - request.targets
            yield self._prediction(hidden[place, first : len(row) - 1], row[-request.targets :])

    def _prediction(self, hidden: torch.Tensor, targets: NDArray[np.int64]) -> Prediction:
        """Losses and hits of targets (n,) from hidden states (n, D), some at a time."""
        size = max(1, _CHUNK_LOGITS // self._model.architecture.vocab_size)
        losses: list[torch.Tensor] = []
        hits: list[torch.Tensor] = []
        wanted = torch.from_numpy(targets.copy()).to(hidden.device)
        for piece, target in zip(hidden.split(size), wanted.split(size), strict=True):
            logits = self._model.head.logits(piece).float()
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            hits.append(logits.argmax(-1) == target)
        return Prediction(torch.cat(losses).cpu().double().numpy(), torch.cat(hits).cpu().numpy())
