"""What the verbs return: each result has `.json()` for machines and `.show(console)` for people.

`api.py` makes them. They hold figures and paths, and never do work.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.compiler.plan import Plan
from penstock.console import Console
from penstock.evaluation.comparison import PairedDifference, paired_difference
from penstock.evaluation.perplexity import Scores
from penstock.evaluation.tasks.task import TaskScores, shown
from penstock.inference.engine import Completion


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """An executable that was made, or found to be there already."""

    path: Path
    plan: Plan
    seconds: float
    reused: bool
    toolchain: str
    """What made its code; "none" where it holds graphs only."""

    def json(self) -> dict[str, Any]:
        """Where it is and what it is for."""
        return {
            "executable": str(self.path),
            "bytes": self.path.stat().st_size,
            "seconds": round(self.seconds, 3),
            "reused": self.reused,
            "toolchain": self.toolchain,
            "plan": self.plan.json(),
        }

    def show(self, console: Console) -> None:
        """One line."""
        state = "reused, unchanged" if self.reused else f"{self.seconds:.0f} s"
        console.path(f"executable ({state})", self.path)


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores of a model on a split, of compressors on the same text where asked for, and on
    tasks.
    """

    split: str | None
    """None, as the scores, where the split was not asked for."""
    scores: Scores | None
    compressors: dict[str, float]
    """Bits per byte of gzip, bzip2 and xz; empty unless asked for."""
    tasks: list[TaskScores]

    def json(self) -> dict[str, Any]:
        """All figures."""
        values: dict[str, Any] = {}
        if self.scores is not None:
            values = {"split": self.split, **self.scores.json()}
        if self.compressors:
            values["compressors"] = self.compressors
        if self.tasks:
            values["tasks"] = {task.task: task.json() for task in self.tasks}
        return values

    def summary(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """What the run's summary.json takes over; tasks evaluated earlier stay."""
        values = self.json()
        tasks = {**before.get("tasks", {}), **values.pop("tasks", {})}
        compressors = values.pop("compressors", {})
        return {
            **({"evaluation": values} if values else {}),
            **({"compressors": compressors} if compressors else {}),
            **({"tasks": tasks} if tasks else {}),
        }

    def show(self, console: Console) -> None:
        """Scores, the compressors beside the model, and the tasks."""
        if self.scores is not None:
            self.scores.show(console)
        if self.scores is not None and self.compressors:
            ours = {"this model": self.scores.bits_per_byte}
            named = {f"{name} -9": bits for name, bits in self.compressors.items()}
            rows = sorted({**ours, **named}.items(), key=lambda row: row[1])
            console.table(
                f"Bits per byte on the {self.split} split (lower is better)",
                ["", ""],
                [[name, f"{bits:.3f}"] for name, bits in rows],
            )
        for task in self.tasks:
            task.show(console)


@dataclasses.dataclass(frozen=True)
class ComparisonResult:
    """Several models on the same split and tasks, side by side."""

    results: dict[str, EvaluationResult]
    """By the model's name; the others are compared with the first."""

    def json(self) -> dict[str, Any]:
        """All figures of each, and the differences from the first."""
        differences = {
            name: {task: one.json() for task, one in self._differences(result).items()}
            for name, result in list(self.results.items())[1:]
        }
        return {
            "models": {name: result.json() for name, result in self.results.items()},
            "differences": differences,
        }

    def show(self, console: Console) -> None:
        """One table: a line per figure, a column per model; then the paired differences."""
        results = list(self.results.values())
        figures = [_figures(result) for result in results]
        rows = [[name, *(figure.get(name, "–") for figure in figures)] for name in figures[0]]
        console.table("Side by side", ["", *self.results], rows)
        for name, result in list(self.results.items())[1:]:
            for task, difference in self._differences(result).items():
                console.info(f"{task}: {name} {difference} than {next(iter(self.results))}")

    def _differences(self, result: EvaluationResult) -> dict[str, PairedDifference]:
        first = next(iter(self.results.values()))
        pairs = zip(first.tasks, result.tasks, strict=True)
        found = {one.task: paired_difference(one.examples, two.examples) for one, two in pairs}
        return {name: value for name, value in found.items() if value is not None}


def _figures(result: EvaluationResult) -> dict[str, str]:
    """Every figure of a result by a name of its own, as a person reads it."""
    split = {} if result.scores is None else dict(result.scores.rows())
    tasks = {
        f"{task.task} {name.replace('_', ' ')}": shown(name, value)
        for task in result.tasks
        for name, value in task.metrics.items()
    }
    return {**split, **tasks}


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """Completions, in the order of their prompts."""

    completions: list[Completion]
    streamed: bool
    """Whether the text has been shown already."""

    def json(self) -> Any:  # noqa: ANN401 - an object, or a list for several prompts
        """One object for one prompt, else a list."""
        values = [completion.json() for completion in self.completions]
        return values[0] if len(values) == 1 else values

    def show(self, console: Console) -> None:
        """Prompts and their continuations."""
        for completion in self.completions:
            if self.streamed:
                console.info(f"{completion.tokens} tokens in {completion.seconds:.2f} s")
            else:
                completion.show(console)


@dataclasses.dataclass(frozen=True)
class ConversionResult:
    """A folder that was written."""

    folder: Path

    def json(self) -> dict[str, Any]:
        """Where it is."""
        return {"folder": str(self.folder), "files": sorted(p.name for p in self.folder.iterdir())}

    def show(self, console: Console) -> None:
        """One line."""
        console.path("folder for transformers", self.folder)
