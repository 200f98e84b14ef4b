"""Metrics known by name: what can be measured of any command, and what Penstock's verbs report.

`bench/jobs.py` asks which metrics a command has, `bench/figures.py` reads them. It must never run
anything.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from penstock.bench.process import Finished


@dataclasses.dataclass(frozen=True)
class Known:
    """A metric that needs no description."""

    unit: str
    better: Literal["higher", "lower"] | None
    meaning: str


KNOWN = {
    "tokens_per_second": Known("tokens/s", "higher", "trained on, or generated"),
    "samples_per_second": Known("samples/s", "higher", "sequences trained on, or texts generated"),
    "step_seconds": Known("s", "lower", "each optimizer step, with percentiles"),
    "latency_seconds": Known("s", "lower", "each text generated, with percentiles"),
    "startup_seconds": Known("s", "lower", "process start to the end of the first training step"),
    "mfu": Known("%", "higher", "share of the measured matrix-product peak"),
    "memory_bytes": Known("bytes", "lower", "peak memory as training reports it"),
    "loss": Known("nats/token", "lower", "last training loss, or loss of an evaluation"),
    "validation_loss": Known("nats/token", "lower", "best validation loss of training"),
    "perplexity": Known("", "lower", "of an evaluation"),
    "bits_per_byte": Known("bits/byte", "lower", "of an evaluation"),
    "compile_seconds": Known("s", "lower", "time to make an executable"),
    "wall_seconds": Known("s", "lower", "the whole command; any command has it"),
    "peak_memory_bytes": Known(
        "bytes", "lower", "most resident memory of all its processes; any command has it"
    ),
}
"""Unit, direction and meaning by name."""

Reader = Callable[[Any, Finished], list[float]]
"""From a verb's JSON and the finished process to all values of a metric in the run."""


def _value(*path: str, scale: float = 1.0) -> Reader:
    """A number at a path of the report."""

    def read(report: Any, _: Finished) -> list[float]:  # noqa: ANN401 - JSON
        for key in path:
            report = report[key]
        return [] if report is None else [float(report) * scale]

    return read


def _samples_per_second(report: Any, _: Finished) -> list[float]:  # noqa: ANN401 - JSON
    speed = report["throughput"]["tokens_per_second"]
    return [] if speed is None else [speed / report["plan"]["sequence_length"]]


def _step_seconds(report: Any, _: Finished) -> list[float]:  # noqa: ANN401 - JSON
    lines = Path(report["run"], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [float(r["step_seconds"]) for r in records if r.get("step_seconds") is not None]


def _startup(_: Any, run: Finished) -> list[float]:  # noqa: ANN401 - JSON
    return list(run.first_seen.values())[:1]


def _completions(report: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON
    return report if isinstance(report, list) else [report]


def _generating_seconds(report: Any) -> float:  # noqa: ANN401 - JSON
    """Time of all batches; texts of one batch stand together and share its time."""
    return sum(seconds for seconds, _ in itertools.groupby(c["seconds"] for c in report))


def _generated_per_second(report: Any, _: Finished) -> list[float]:  # noqa: ANN401 - JSON
    texts = _completions(report)
    return [sum(text["tokens"] for text in texts) / _generating_seconds(texts)]


def _texts_per_second(report: Any, _: Finished) -> list[float]:  # noqa: ANN401 - JSON
    texts = _completions(report)
    return [len(texts) / _generating_seconds(texts)]


def _latency(report: Any, _: Finished) -> list[float]:  # noqa: ANN401 - JSON
    return [float(text["seconds"]) for text in _completions(report)]


READERS: dict[str, dict[str, Reader]] = {
    "train": {
        "tokens_per_second": _value("throughput", "tokens_per_second"),
        "samples_per_second": _samples_per_second,
        "step_seconds": _step_seconds,
        "startup_seconds": _startup,
        "mfu": _value("throughput", "mfu", scale=100),
        "memory_bytes": _value("memory_bytes"),
        "loss": _value("loss", "final"),
        "validation_loss": _value("loss", "best_validation"),
    },
    "generate": {
        "tokens_per_second": _generated_per_second,
        "samples_per_second": _texts_per_second,
        "latency_seconds": _latency,
    },
    "evaluate": {
        "loss": _value("loss"),
        "perplexity": _value("perplexity"),
        "bits_per_byte": _value("bits_per_byte"),
    },
    "compile": {"compile_seconds": _value("seconds")},
}
"""What each verb's `--json` tells, by metric."""

ANY_COMMAND = ("wall_seconds", "peak_memory_bytes")
"""Measured from outside, whatever the command: fields of `Finished`."""


def available(verb: str | None) -> list[str]:
    """Metrics known by name for a verb of Penstock, or for another program."""
    return [*READERS.get(verb or "", {}), *ANY_COMMAND]
