"""Graphcore's benchmark files (`benchmarks.yml` of its examples), read as specifications of ours.

`bench/jobs.py` calls it for a file without `benchmarks`. Format: graphcore/examples-utils,
`benchmarks/docs/user_guide/specification_files.rst`. What cannot be translated keeps its name, so
that it is refused by name as an unknown key; it must never guess.
"""

from collections.abc import Mapping
from typing import Any

from penstock.config.document import Document

_KEYS = {"cmd": "command", "env": "environment", "description": "description"}
_REDUCTIONS = {"final": "last", "mean": "mean", "min": "min", "max": "max"}
_UNTOLD = ("data", "output")
"""Keys that become the metrics."""


def is_graphcore(value: object) -> bool:
    """Whether a document is one of Graphcore's: named entries at the root, some with a `cmd`."""
    if not isinstance(value, dict) or "benchmarks" in value:
        return False
    return any(isinstance(entry, dict) and "cmd" in entry for entry in value.values())


def translate(document: Document) -> Document:
    """The same benchmarks as a document of ours, each run once, as Graphcore's tool does.

    Entries without a command are anchors for others, and left out.
    """
    entries = {
        name: _benchmark(entry)
        for name, entry in document.value.items()
        if isinstance(entry, dict) and "cmd" in entry
    }
    lines = {("benchmarks", *place): line for place, line in document.lines.items()}
    return Document(document.path, {"benchmarks": entries}, lines)


def _benchmark(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One entry; its units are in `output`, as [unit, metric]."""
    units: dict[Any, Any] = {}
    for pair in entry.get("output") or []:
        if isinstance(pair, list) and len(pair) == 2:
            units[str(pair[1])] = pair[0]
    data = entry.get("data")
    metrics: Any = data
    if isinstance(data, dict):
        metrics = {name: _metric(name, value, units.get(name)) for name, value in data.items()}
    others = {_KEYS.get(key, key): v for key, v in entry.items() if key not in _UNTOLD}
    measured = {"wall_seconds": None, "peak_memory_bytes": None}
    joined: Any = {**metrics, **measured} if isinstance(metrics, dict) else metrics or measured
    return {"rounds": 1, "warmup_rounds": 0, **others, "metrics": joined}


def _metric(name: str, value: Any, unit: Any) -> Any:  # noqa: ANN401 - whatever the file holds
    if not isinstance(value, dict):
        return value
    told: dict[str, Any] = {"reduce" if k == "reduction_type" else k: v for k, v in value.items()}
    if "regexp" in told:
        told["regex"] = told.pop("regexp")
    if "reduce" in told:
        told["reduce"] = _REDUCTIONS.get(str(told["reduce"]), told["reduce"])
    if unit is not None:
        told["unit"] = str(unit)
    if name in ("throughput", "latency"):
        told["better"] = "higher" if name == "throughput" else "lower"
    return told
