"""How well a masked language model fills in what is hidden of a split, always the same tokens.

`evaluate_run.py` calls `evaluate_masked`. It must never know where model and data come from.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from penstock.console import get_console
from penstock.data.dataset import Split
from penstock.data.loader import Loader
from penstock.data.objective import Objective
from penstock.data.samples import SplitSamples
from penstock.evaluation.tasks.task import TaskScores
from penstock.models.transformer import Transformer

_ROWS = 512
"""Positions whose logits exist at once."""


@torch.no_grad()
def evaluate_masked(
    model: Transformer,
    split: Split,
    objective: Objective,
    *,
    sequence_length: int,
    batch: int,
    settings: dict[str, Any],
) -> TaskScores:
    """Hide tokens of every sequence of a split, and score what the model puts in their place.

    Accuracy is the share of hidden tokens that are the model's likeliest, perplexity exp of the
    mean loss over them (as BERT's and RoBERTa's authors give it). The model is given (batch,
    sequence_length) tokens at a time, never fewer. `settings`: what the figures depend on.

    Raises:
        DataError: an empty split.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    samples = SplitSamples(split, sequence_length, shuffle=False)
    loader = Loader(
        samples,
        sequence_length=sequence_length,
        batch_size=batch,
        micro=batch,
        objective=objective,
    )
    loss, hits, count = 0.0, 0, 0
    with get_console().progress(f"evaluating {split.name}", total=samples.count) as progress:
        for position in range(0, samples.count, batch):
            rows = min(batch, samples.count - position)
            for given in loader.micro_batches(position):
                segments = None if given.segments is None else given.segments.to(device)
                hidden = model.hidden(given.tokens.to(device), segments)
                hidden_tokens = given.loss_weights > 0
                hidden_tokens[rows:] = False  # samples from the start that fill up the batch
                found = _score(model, hidden[hidden_tokens], given.targets[hidden_tokens])
                loss, hits, count = loss + found[0], hits + found[1], count + found[2]
            progress.advance(rows)
    mean = loss / max(1, count)
    metrics = {
        "accuracy": hits / max(1, count),
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "loss": mean,
        "tokens": count,
    }
    return TaskScores("masked", metrics, settings, [], time.perf_counter() - started)


def _score(model: Transformer, x: Tensor, targets: Tensor) -> tuple[float, int, int]:
    """Sum of losses in nats, hits and number of positions x (N, D) with targets (N,) int64."""
    loss, hits = 0.0, 0
    for piece, wanted in zip(x.split(_ROWS), targets.to(x.device).split(_ROWS), strict=True):
        logits = model.head.logits(piece).float()
        chosen = logits.gather(1, wanted.unsqueeze(1)).squeeze(1)
        loss += float((torch.logsumexp(logits, -1) - chosen).double().sum())
        hits += int((logits.argmax(-1) == wanted).sum())
    return loss, hits, len(targets)
