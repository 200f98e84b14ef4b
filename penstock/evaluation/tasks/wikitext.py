"""Perplexity of WikiText as the literature reports it: per token, and per original word.

`evaluation/tasks/registry.py` lists it. It must never know where the model comes from.

Source: NVIDIA/Megatron-LM (tasks/zeroshot_gpt), which Graphcore's evaluation follows: the text is
de-tokenised, its tokens are scored in windows of the model's length that move by `evaluate.stride`,
and the loss per token times (tokens − 1) / (original words − 1) is the loss per word.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.config.schema import EvaluateSection
from penstock.errors import DataError
from penstock.evaluation.detokenize import detokenize_wikitext
from penstock.evaluation.scoring import Request
from penstock.evaluation.tasks.task import Subject, TaskScores, find_file, read_text

_FILES = (
    "wikitext*/*test*",
    "wikitext*/*valid*",
    "wiki.test.*",
    "wiki.valid.*",
    "test.txt",
    "valid.txt",
)
_LARGEST_EXPONENT = 20.0
"""Perplexities are cut off at exp(20), as the source does."""


class WikiText:
    """WikiText's tokenised text, in one file."""

    name = "wikitext"

    def __init__(self, section: EvaluateSection) -> None:
        """Read the file; `evaluate.limit` counts its lines."""
        self._path = find_file(section.task_data, self.name, _FILES)
        lines = read_text(self._path).splitlines(keepends=True)
        original = "".join(lines[: section.limit])
        self._words = len(original.strip().split(" "))
        self._text = detokenize_wikitext(original)
        self._stride = section.stride
        if self._words < 2:
            raise DataError(
                f"{self._path} has no text", where="evaluate.task_data", do="check the file"
            )

    def run(self, subject: Subject) -> TaskScores:
        """Score every token but the first."""
        started = time.perf_counter()
        tokens = np.array(subject.tokenizer.encode_prompt(self._text), np.int64)
        length = subject.scorer.length
        stride = min(self._stride or -(-length // 2), length)
        requests = list(overlapping_windows(tokens, length, stride))
        predictions = subject.scorer.predict(requests, self.name)
        targets = len(tokens) - 1
        loss = sum(prediction.loss for prediction in predictions) / targets
        ratio = targets / (self._words - 1)
        return TaskScores(
            task=self.name,
            metrics={
                "word_perplexity": math.exp(min(_LARGEST_EXPONENT, loss * ratio)),
                "perplexity": math.exp(min(_LARGEST_EXPONENT, loss)),
                "loss": loss,
                "tokens": targets,
                "words": self._words,
                "tokens_per_word": ratio,
            },
            settings=_settings(self._path, length, stride),
            examples=[
                {"targets": request.targets, "loss": prediction.loss}
                for request, prediction in zip(requests, predictions, strict=True)
            ],
            seconds=time.perf_counter() - started,
        )


def _settings(path: Path, length: int, stride: int) -> dict[str, Any]:
    return {"data": str(path), "sequence_length": length, "stride": stride}


def overlapping_windows(tokens: NDArray[np.int64], length: int, stride: int) -> Iterator[Request]:
    """Windows of `length` inputs that start at multiples of `stride`; every token but the first
    is a target once: all of the first window's, the last `stride` of each later one.
    """
    targets = len(tokens) - 1
    covered = 0
    for start in range(0, max(1, targets), stride):
        end = min(start + length, targets)
        if end > covered:
            yield Request(tokens[start : end + 1], end - covered)
            covered = end
