"""What a task is: data read at once, a model scored on it later, figures and examples out of it.

`evaluation/tasks/registry.py` lists the tasks, `evaluate_run.py` runs them. It must never know any
one task.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from penstock.console import Console
from penstock.data.tokenizer import Tokenizer
from penstock.errors import DataError
from penstock.evaluation.scoring import Request, Scorer
from penstock.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to evaluate."""

    model: Transformer
    tokenizer: Tokenizer
    scorer: Scorer
    batch: int
    """Most prompts or windows per device pass."""


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """What came out of one task on one model."""

    task: str
    metrics: dict[str, float]
    """Figures by name; the first is the headline."""
    settings: dict[str, Any]
    """What the figures depend on besides the model: data file, window, stride, prompt."""
    examples: list[dict[str, Any]]
    """One record per example, plain JSON; `correct` where an example is right or wrong."""
    seconds: float

    def json(self) -> dict[str, Any]:
        """Figures and settings, without the examples; null where JSON has no number."""
        figures = {k: v if math.isfinite(v) else None for k, v in self.metrics.items()}
        return {**figures, **self.settings, "seconds": round(self.seconds, 3)}

    def show(self, console: Console) -> None:
        """As a table."""
        title = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in self.settings.items())
        console.table(
            f"{self.task} ({title})",
            ["", ""],
            [[name.replace("_", " "), shown(name, value)] for name, value in self.metrics.items()],
        )


def shown(name: str, value: float) -> str:
    """A figure as a person reads it: shares in percent, counts whole."""
    if "accuracy" in name:
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


class Task(Protocol):
    """Something a model is scored on. Making one reads its data, before any model is loaded."""

    name: str

    def run(self, subject: Subject) -> TaskScores:
        """Score a model."""
        ...


def continuation(tokenizer: Tokenizer, context: str, text: str) -> Request:
    """The tokens of `text` as it goes on after `context`; an empty context starts a document.

    Both are encoded at once, since some tokenizers put a space before the first word of a text;
    apart where a token would reach over the border.
    """
    before = tokenizer.encode_prompt(context)
    whole = (
        tokenizer.encode_prompt(context + text) if context else [*before, *tokenizer.encode(text)]
    )
    if whole[: len(before)] != before or len(whole) == len(before):
        whole = [*before, *tokenizer.encode(text)]
    return Request(np.array(whole, np.int64), len(whole) - len(before))


def shortened(tokenizer: Tokenizer, prompt: str, room: int) -> str:
    """The prompt, or its end where all of it has more than `room` tokens."""
    tokens = tokenizer.encode(prompt)
    first = len(tokens) - room
    while len(tokens) > room > 0:
        # What is left of a word, or of a character, may have more tokens alone than it had.
        prompt = tokenizer.decode(tokens[first:]).lstrip("\ufffd")
        tokens, first = tokenizer.encode(prompt), 1
    return prompt


def find_file(section_data: str | None, name: str, patterns: tuple[str, ...]) -> Path:
    """The data file of a task: `evaluate.task_data` itself, or the first of `patterns` in it.

    Raises:
        DataError: nothing there.
    """
    if section_data is None:
        raise DataError(
            f"the task {name} has no data",
            where="evaluate.task_data",
            do=f"name its file, or a folder with {patterns[0]}",
        )
    path = Path(section_data)
    if path.is_file():
        return path
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if found:
            return found[0]
    raise DataError(
        f"{path} holds no data of the task {name}: none of {', '.join(patterns)}",
        where="evaluate.task_data",
        do="name the file, or a folder that has one of these",
    )


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", where="evaluate.task_data", do="check the file"
        ) from None
