"""Held-out loss, perplexity and bits per byte by sliding windows.

`api.evaluate` calls `evaluate_split`. It must never know where model and data come from.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from penstock.console import Console, get_console
from penstock.data.dataset import Split
from penstock.data.objective import segments_of
from penstock.errors import DataError
from penstock.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well a model predicts a split. Every token is scored exactly once."""

    loss: float
    """Nats per token."""
    tokens: int
    """Targets scored, end-of-text tokens among them."""
    text_bytes: int
    """UTF-8 bytes of the split's text."""
    words: int
    """Whitespace-separated words of the split's text."""
    seconds: float
    """Time it took."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """exp(total nats / words): comparable between tokenizers; infinite where hardly anything
        is between spaces, as in Chinese.
        """
        return _exp(self.loss * self.tokens / max(1, self.words))

    @property
    def bits_per_byte(self) -> float:
        """Total bits / UTF-8 bytes of the text: comparable with compressors."""
        return self.loss * self.tokens / math.log(2) / max(1, self.text_bytes)

    def json(self) -> dict[str, Any]:
        """All figures; null for those without a finite value, which JSON cannot hold."""
        derived = ("perplexity", "word_perplexity", "bits_per_byte")
        values = {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def rows(self) -> list[tuple[str, str]]:
        """Figures for a table."""
        return [
            ("loss", f"{self.loss:.4f} nats per token"),
            ("perplexity", f"{self.perplexity:,.2f} per token"),
            ("word perplexity", f"{self.word_perplexity:,.2f}"),
            ("bits per byte", f"{self.bits_per_byte:.3f}"),
            ("scored", f"{self.tokens:,} tokens, {self.text_bytes:,} bytes"),
        ]

    def show(self, console: Console) -> None:
        """As a table."""
        console.table("Held-out scores", ["", ""], self.rows())


def _exp(value: float) -> float:
    """exp, infinite where a float would overflow."""
    return math.exp(value) if value < 700 else math.inf


@dataclasses.dataclass(frozen=True)
class Window:
    """One window over the stream: inputs start at `start`, targets from `scored` on count."""

    start: int
    """First target, as a place in the stream of the split's tokens."""
    scored: int
    """First target of the window, as an offset, that no earlier window has scored."""


def windows(targets: int, length: int, stride: int) -> Iterator[Window]:
    """Cover `targets` targets, each scored once, with as much context as `stride` leaves.

    The first window scores all its targets; each later one moves on by `stride` and scores its
    last `stride` ones (Press et al., arXiv 2012.15832, §2, "sliding window").
    """
    yield Window(0, 0)
    covered = min(length, targets)
    while covered < targets:
        start = min(covered + stride, targets) - length
        yield Window(start, covered - start)
        covered = min(covered + stride, targets)


@torch.no_grad()
def evaluate_split(
    model: Transformer,
    split: Split,
    *,
    sequence_length: int,
    stride: int | None,
    batch: int,
    by_document: bool = False,
) -> Scores:
    """Score every token of a split; the first follows an end-of-text token.

    The model is given (batch, sequence_length) tokens at a time, never fewer. `stride`: tokens a
    window moves on, half the sequence length when None, and never more than all of it.
    `by_document`: tokens see their own document alone, but a document's first token, which is
    predicted from the end of the one before.

    Raises:
        DataError: an empty split.
    """
    started = time.perf_counter()
    if split.token_count == 0:
        raise DataError(
            f"split {split.name} is empty", where="evaluate.split", do="choose another split"
        )
    device = next(model.parameters()).device
    stride = min(stride or -(-sequence_length // 2), sequence_length)
    plan = list(windows(split.token_count, sequence_length, stride))
    total = 0.0
    with get_console().progress(f"evaluating {split.name}", total=len(plan)) as progress:
        for first in range(0, len(plan), batch):
            chosen = plan[first : first + batch]
            tokens, targets, weights = _rows(split, chosen, sequence_length, batch)
            segments = _segments(tokens, split.end_of_text).to(device) if by_document else None
            losses = model.token_losses(tokens.to(device), targets.to(device), segments)
            total += float((losses.cpu().double() * weights).sum())
            progress.advance(len(chosen))
    return Scores(
        loss=total / split.token_count,
        tokens=split.token_count,
        text_bytes=split.text_bytes,
        words=split.words,
        seconds=time.perf_counter() - started,
    )


def _rows(
    split: Split, chosen: list[Window], length: int, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T) int64 and weights (B, T) float64, filled up with weight 0."""
    stream = np.full((batch, length + 1), split.end_of_text, np.int64)
    weights = np.zeros((batch, length))
    for row, window in enumerate(chosen):
        end = min(window.start + length, split.token_count)
        count = end - window.start
        # Target i of the stream is token i; its input is the token before, end-of-text at first.
        if window.start > 0:
            stream[row, 0] = split.tokens[window.start - 1]
        stream[row, 1 : count + 1] = split.tokens[window.start : end]
        weights[row, window.scored : count] = 1.0
    packed = torch.from_numpy(stream)
    return packed[:, :-1].contiguous(), packed[:, 1:].contiguous(), torch.from_numpy(weights)


def _segments(tokens: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Numbers of the documents in each row (B, T) int64; see `data/objective.py`."""
    rows = tokens.numpy()
    return torch.from_numpy(np.stack([segments_of(row, len(row), end_of_text) for row in rows]))
