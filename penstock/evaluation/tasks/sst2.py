"""SST-2 by generation: a prompt around a sentence, and the text of its label as the continuation.

`evaluation/tasks/registry.py` lists it. It must never know where the model comes from.

The prompt is that of SambaNova's tutorial (sambanova/tutorials, generative_nlp). Greedy decoding
writes a label exactly when each of its tokens is the likeliest after those before, which is
their accuracy too; here the text is really generated, so that it can be read.
"""

import codecs
import json
import time
from pathlib import Path
from typing import Any, TypeVar

from penstock.config.schema import EvaluateSection, GenerateSection
from penstock.data.tokenizer import Tokenizer
from penstock.errors import ConfigError, DataError
from penstock.evaluation.tasks.task import Subject, TaskScores, find_file, read_text, shortened
from penstock.inference.engine import Engine

_FILES = ("sst2*/dev.*", "SST-2/dev.tsv", "sst2*.jsonl", "dev.tsv", "dev.jsonl")
_FIELD = "{text}"
_Row = TypeVar("_Row")


class Sst2:
    """Sentences and the texts of their labels: `sentence TAB number` lines, or JSON lines with
    `prompt` and `completion` as prepared for training.
    """

    name = "sst2"

    def __init__(self, section: EvaluateSection) -> None:
        """Read the file; `evaluate.limit` counts sentences."""
        if _FIELD not in section.template:
            raise ConfigError(
                f"the prompt has no place for the sentence: no {_FIELD}",
                where="evaluate.template",
                do="write for instance evaluate.template='Review: {text}'",
            )
        self._path = find_file(section.task_data, self.name, _FILES)
        if self._path.suffix == ".jsonl":
            pairs = _read_pairs(self._path)
            self._labels = sorted({label for _, label in pairs})
        else:
            pairs = [
                (section.template.replace(_FIELD, text), section.labels[label])
                for text, label in _read_rows(self._path, len(section.labels))
            ]
            self._labels = section.labels
        self._pairs = pairs[: section.limit]

    def run(self, subject: Subject) -> TaskScores:
        """Generate as many tokens as the longest label has, and compare the texts."""
        started = time.perf_counter()
        labels, room = self._labels, subject.scorer.length
        longest = require_clear_labels(labels, self._pairs[0][0], subject.tokenizer)
        engine = Engine(subject.model, subject.tokenizer)
        section = GenerateSection(tokens=longest, batch=subject.batch)
        prompts = [
            shortened(subject.tokenizer, prompt, room - longest) for prompt, _ in self._pairs
        ]
        completions = engine.generate(prompts, section, seed=0)
        examples: list[dict[str, Any]] = [
            {
                "prompt": prompt,
                "label": label.strip(),
                "generated": completion.text.strip(),
                "correct": _says(completion.text, label),
            }
            for (prompt, label), completion in zip(self._pairs, completions, strict=True)
        ]
        named = sum(any(_says(one["generated"], label) for label in labels) for one in examples)
        return TaskScores(
            task=self.name,
            metrics={
                "accuracy": sum(one["correct"] for one in examples) / len(examples),
                "labels_accuracy": named / len(examples),
                "sentences": len(examples),
            },
            settings={"data": str(self._path), "labels": [label.strip() for label in labels]},
            examples=examples,
            seconds=time.perf_counter() - started,
        )


def _says(text: str, label: str) -> bool:
    """Whether generated text is, or begins with, the label."""
    return text.strip().startswith(label.strip())


def require_clear_labels(labels: list[str], prompt: str, tokenizer: Tokenizer) -> int:
    """Refuse labels that tokens cannot tell apart; the most tokens one of them has.

    Raises:
        ConfigError: two are equal, one begins with another, or one joins the prompt's end into
            one token.
    """
    if len(set(labels)) < len(labels):
        raise ConfigError(
            f"two labels are the same text: {', '.join(map(repr, labels))}",
            where="evaluate.labels",
            do="give each number a label of its own",
        )
    stripped = {label.strip() for label in labels}
    for label in stripped:
        longer = [other for other in stripped if other != label and other.startswith(label)]
        if longer or not label:
            raise ConfigError(
                f"the label {label!r} is also how {longer[0] if longer else 'every label'!r} "
                "begins: generated text cannot tell them apart",
                where="evaluate.labels",
                do="choose labels that do not begin alike",
            )
    before = tokenizer.encode(prompt)
    most = 1
    for label in labels:
        whole = tokenizer.encode(prompt + label)
        if whole[: len(before)] != before or len(whole) == len(before):
            raise ConfigError(
                f"the label {label!r} tokenises ambiguously: its first characters and the "
                f"prompt's last, {prompt[-10:]!r}, become one token",
                where="evaluate.labels",
                do="start labels with a space, and end evaluate.template without one",
            )
        most = max(most, len(whole) - len(before))
    return most


def _read_rows(path: Path, labels: int) -> list[tuple[str, int]]:
    """Sentences and the numbers of their labels; a heading line is passed over."""
    rows: list[tuple[str, int]] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        text, tab, label = line.rstrip("\r").rpartition("\t")
        if number == 1 and label == "label":
            continue
        if not tab or not label.isdecimal() or int(label) >= labels:
            raise DataError(
                f"line {number} is not a sentence, a tab and a label from 0 to {labels - 1}",
                where=f"{path}:{number}",
                do="write one sentence with its label per line, or name all evaluate.labels",
            )
        rows.append((text, int(label)))
    return _some(rows, path)


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    """Prompts and completions as SambaNova's tool joins them: one space between."""
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompt, completion = str(value["prompt"]), str(value["completion"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f'line {number} is not {{"prompt": "…", "completion": "…"}}',
                where=f"{path}:{number}",
                do="write one JSON object with both per line",
            ) from None
        pairs.append((prompt.rstrip(" "), f" {completion.strip()}"))
    return _some(pairs, path)


def _some(rows: list[_Row], path: Path) -> list[_Row]:
    if not rows:
        raise DataError(f"{path} has no sentences", where="evaluate.task_data", do="check the file")
    return rows
