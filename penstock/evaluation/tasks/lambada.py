"""LAMBADA (Paperno et al., arXiv 1606.06031): would the model write a passage's last word?

`evaluation/tasks/registry.py` lists it. It must never know where the model comes from.

Source of the definitions: NVIDIA/Megatron-LM (tasks/zeroshot_gpt), which Graphcore's evaluation
follows. Strict: all tokens of the last word are the likeliest, each after those before. Last
token: only the passage's last token is asked for.
"""

import codecs
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from penstock.config.schema import EvaluateSection
from penstock.data.tokenizer import Tokenizer
from penstock.errors import DataError
from penstock.evaluation.scoring import Request
from penstock.evaluation.tasks.task import Subject, TaskScores, continuation, find_file

_FILES = ("lambada*/*.jsonl", "lambada*.jsonl")


class Lambada:
    """De-tokenised passages, one {"text": …} a line."""

    name = "lambada"

    def __init__(self, section: EvaluateSection) -> None:
        """Read the file; `evaluate.limit` counts passages."""
        self._path = find_file(section.task_data, self.name, _FILES)
        self._passages = read_passages(self._path)[: section.limit]

    def run(self, subject: Subject) -> TaskScores:
        """Accuracy over all passages, strict and by the last token."""
        started = time.perf_counter()
        tokenizer = subject.tokenizer
        parts = [split_last_word(text) for text in self._passages]
        words = [continuation(tokenizer, context, f" {word}") for context, word in parts]
        last = [_last_token(text, tokenizer) for text in self._passages]
        by_word = subject.scorer.predict(words, self.name)
        by_token = subject.scorer.predict(last, f"{self.name}, last token")
        loss = float(np.mean([prediction.loss for prediction in by_word]))
        examples: list[dict[str, Any]] = [
            {
                "context": context,
                "word": word,
                "correct": answer.all_hit,
                "correct_last_token": token.all_hit,
                "loss": answer.loss,
            }
            for (context, word), answer, token in zip(parts, by_word, by_token, strict=True)
        ]
        return TaskScores(
            task=self.name,
            metrics={
                "accuracy": float(np.mean([one.all_hit for one in by_word])),
                "last_token_accuracy": float(np.mean([one.all_hit for one in by_token])),
                "perplexity": math.exp(min(loss, 700.0)),
                "passages": len(self._passages),
            },
            settings={"data": str(self._path), "sequence_length": subject.scorer.length},
            examples=examples,
            seconds=time.perf_counter() - started,
        )


def read_passages(path: Path) -> list[str]:
    """The `text` of each line.

    Raises:
        DataError: no file, or a line without at least two words of text; it is named.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}",
            where="evaluate.task_data",
            do="check the file",
        ) from None
    passages: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str) or len(text.split()) < 2:
            raise DataError(
                f'line {number} is not {{"text": "a passage"}}',
                where=f"{path}:{number}",
                do="write one JSON object with a passage per line",
            )
        passages.append(text)
    if not passages:
        raise DataError(f"{path} has no passages", where="evaluate.task_data", do="check the file")
    return passages


def split_last_word(text: str) -> tuple[str, str]:
    """Everything before the last word, stripped, and the last word."""
    word = text.rsplit(maxsplit=1)[-1]
    return text[: text.rfind(word)].strip(), word


def _last_token(text: str, tokenizer: Tokenizer) -> Request:
    """The last token of the passage as it is encoded whole."""
    return Request(np.array(tokenizer.encode_prompt(text), np.int64), 1)
