"""summary.json: what came out of a run, and where and with what it ran."""

import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.console import Console
from penstock.errors import CheckpointError
from penstock.files import atomic_write
from penstock.hardware.detect import gpus, memory_bytes, processor_name, usable_cores
from penstock.hardware.process import process_report

if TYPE_CHECKING:
    from penstock.report.page import ReportFiles

_FILE = "summary.json"


@dataclasses.dataclass
class RunSummary:
    """A run's results; `values` is the content of summary.json."""

    run: Path
    values: dict[str, Any]
    report: "ReportFiles | None" = None

    @staticmethod
    def read(run: Path) -> "RunSummary":
        """Read RUN/summary.json, or start an empty one.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = run / _FILE
        if not path.is_file():
            return RunSummary(run, {})
        try:
            return RunSummary(run, dict(json.loads(path.read_bytes())))
        except (ValueError, TypeError):
            raise CheckpointError(
                f"{path} is damaged", where="run", do="remove it and train again to write it anew"
            ) from None

    def write(self) -> None:
        """Write summary.json, atomically."""
        atomic_write(self.run / _FILE, json.dumps(self.values, indent=2) + "\n")

    def json(self) -> dict[str, Any]:
        """Everything, and where the run is."""
        return {"run": str(self.run), **self.values}

    def show(self, console: Console) -> None:
        """The headline figures and the artefacts."""
        loss, speed = self.values["loss"], self.values["throughput"]
        rows = [
            ["steps", f"{self.values['steps']:,}"],
            ["tokens", f"{self.values['tokens']:,}"],
            ["time in steps", f"{self.values['seconds']:,.0f} s"],
            ["final training loss", _figure(loss["final"], ".4f")],
            ["best validation loss", _figure(loss["best_validation"], ".4f")],
            ["tokens per second", _figure(speed["tokens_per_second"], ",.0f")],
            ["share of measured peak", _figure(speed["mfu"], ".0%")],
            ["peak memory", f"{self.values['memory_bytes'] / 2**30:.2f} GiB"],
        ]
        console.table(f"Run {self.run}", ["", ""], rows)
        if not self.values["complete"]:
            console.info("resumable: stopped before its end; the same command goes on from here")
        console.path("run", self.run)
        if self.report is not None:
            self.report.show(console)


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def environment() -> dict[str, Any]:
    """Machine and versions, for the summary."""
    names = ("penstock", "torch", "numpy", "tokenizers", "safetensors")
    return {
        "environment": {
            "processor": processor_name(),
            "cores": usable_cores(),
            "memory_bytes": memory_bytes(),
            "gpus": [name for name, _ in gpus()],
            "system": platform.platform(),
            **process_report(),
        },
        "versions": {
            "python": sys.version.split()[0],
            **{name: _version(name) for name in names},
        },
    }


def shown_environment(summary: Mapping[str, Any]) -> dict[str, str]:
    """Machine and versions as pages show them; what a file lacks is left out."""
    parts = [summary.get(name) for name in ("environment", "versions")]
    facts = {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}
    memory = facts.pop("memory_bytes", None)
    if isinstance(memory, int | float):
        facts["memory"] = f"{memory / 2**30:.1f} GiB"
    if isinstance(facts.get("gpus"), list):
        facts["gpus"] = ", ".join(map(str, facts["gpus"])) or "none"
    return {name: str(value) for name, value in facts.items()}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
