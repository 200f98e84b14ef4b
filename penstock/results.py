"""What the verbs return: each result has `.json()` for machines and `.show(console)` for people.

`api.py` makes them. They hold figures and paths, and never do work.
"""

import dataclasses
from pathlib import Path
from typing import Any

from penstock.compiler.plan import Plan
from penstock.console import Console
from penstock.evaluation.perplexity import Scores
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
    """Scores of a model on a split, and of compressors on the same text where asked for."""

    split: str
    scores: Scores
    compressors: dict[str, float]
    """Bits per byte of gzip, bzip2 and xz; empty unless asked for."""

    def json(self) -> dict[str, Any]:
        """All figures."""
        values = {"split": self.split, **self.scores.json()}
        return values if not self.compressors else {**values, "compressors": self.compressors}

    def show(self, console: Console) -> None:
        """Scores, and the compressors beside the model."""
        self.scores.show(console)
        if self.compressors:
            ours = {"this model": self.scores.bits_per_byte}
            named = {f"{name} -9": bits for name, bits in self.compressors.items()}
            rows = sorted({**ours, **named}.items(), key=lambda row: row[1])
            console.table(
                f"Bits per byte on the {self.split} split (lower is better)",
                ["", ""],
                [[name, f"{bits:.3f}"] for name, bits in rows],
            )


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
