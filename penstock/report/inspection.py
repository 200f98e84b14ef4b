"""What `penstock inspect` shows of executables and runs."""

import dataclasses
import json
from typing import Any

from penstock.checkpoint import list_checkpoints
from penstock.compiler.executable import Executable
from penstock.console import Console
from penstock.errors import ConfigError
from penstock.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A title, facts, and a table."""

    values: dict[str, Any]
    title: str
    facts: list[list[str]]
    columns: list[str]
    rows: list[list[str]]

    def json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return self.values

    def show(self, console: Console) -> None:
        """Two tables."""
        console.table(self.title, ["", ""], self.facts)
        if self.rows:
            console.table("", self.columns, self.rows)


def inspect_executable(executable: Executable) -> Inspection:
    """Origin, plan, toolchain, and every kernel's tensors and size."""
    plan, manifest = executable.plan, executable.manifest
    a = plan.architecture
    toolchain = manifest["toolchain"]
    kernels = manifest["kernels"]
    facts = [
        [
            "made by",
            {"yours": "you (signature verified)"}.get(executable.origin, executable.origin),
        ],
        ["SHA-256", executable.sha256],
        ["regions", f"{a.hidden_size} wide, {a.heads} heads, {a.vocab_size:,} tokens, any depth"],
        ["shape", f"{plan.micro} × {plan.sequence_length} tokens, {plan.compute}, {plan.device}"],
        ["planned for", f"{a.layers} layers, {plan.memory['total'] / 2**20:,.0f} MiB in all"],
        ["torch", toolchain["torch"]],
        ["processor features", ", ".join(toolchain["processor_features"]) or "none noted"],
    ]
    rows = [
        [
            name,
            f"{manifest['members'][f'kernels/{name}.so']['bytes'] / 1024:,.0f} KiB",
            str(len(entry["spec"]["inputs"])),
            str(len(entry["spec"]["outputs"])),
        ]
        for name, entry in kernels.items()
    ]
    values = {
        "kind": "executable",
        "path": str(executable.path),
        "sha256": executable.sha256,
        "origin": executable.origin,
        **manifest,
    }
    columns = ["kernel", "machine code", "tensors in", "tensors out"]
    return Inspection(values, f"Executable {executable.path}", facts, columns, rows)


def inspect_run(run: RunFolder) -> Inspection:
    """How far a run is and what it reached.

    Raises:
        ConfigError: the folder is neither a run nor anything else known.
    """
    if not run.config.is_file():
        raise ConfigError(
            f"{run.path} is neither an executable, a dataset nor a run",
            where="inspect",
            do="give a .penstock file, a folder with dataset.json, or a run folder",
        )
    summary: dict[str, Any] = json.loads(run.summary.read_bytes()) if run.summary.is_file() else {}
    checkpoints = [path.name for path in list_checkpoints(run.checkpoints)]
    facts = [
        [name, str(summary[name])] for name in ("complete", "steps", "tokens") if name in summary
    ]
    facts += [[f"loss, {name}", str(value)] for name, value in summary.get("loss", {}).items()]
    evaluation = summary.get("evaluation", {})
    facts += [
        [name, f"{evaluation[name]:.4f}"]
        for name in ("perplexity", "bits_per_byte")
        if evaluation.get(name) is not None
    ]
    rows = [[name] for name in checkpoints]
    values = {"kind": "run", "path": str(run.path), "checkpoints": checkpoints, "summary": summary}
    return Inspection(values, f"Run {run.path}", facts, ["checkpoints"], rows)
