"""The figures of one finished run: what Penstock reports, JSON fields, matches of expressions.

`bench/runner.py` calls it for each metric. It must never run anything.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from penstock.bench.process import Finished, Watch
from penstock.bench.reported import ANY_COMMAND, READERS
from penstock.bench.spec import Metric
from penstock.errors import BenchmarkError

STEPWISE = ("step_seconds",)
"""Metrics known by name whose values are one a step."""


def watch_of(name: str, metric: Metric, file: Path | None, run: Path | None) -> Watch | None:
    """What must be timed while the command runs; None where nothing is.

    `file` is the metric's own, `run` the run folder of `penstock train`.
    """
    if metric.until is not None:
        return Watch(metric.until, file)
    if name == "startup_seconds" and not metric.is_described and run is not None:
        return Watch('"loss"', run / "metrics.jsonl")
    return None


def figures(
    name: str,
    metric: Metric,
    run: Finished,
    *,
    verb: str | None,
    file: Path | None,
    watch: Watch | None,
    skip: int,
) -> list[float]:
    """Every value of a metric in a run, after the first `skip` where there is one a step.

    Raises:
        BenchmarkError: there is none, or it is no number.
    """
    if watch is not None:
        seconds = run.first_seen.get(watch)
        values, looked_for = [] if seconds is None else [seconds], watch.pattern
    elif metric.regex is not None:
        values = [_number(name, match) for match in re.findall(metric.regex, _text(run, file))]
        looked_for = metric.regex
    elif metric.json_ is not None:
        values, looked_for = _fields(name, metric, run, file), metric.json_
    elif name in ANY_COMMAND:
        return [float(getattr(run, name)) * metric.scale]
    else:
        values, looked_for = _reported(name, run, verb or ""), "its report"
    if len(values) > 1 or name in STEPWISE:
        values = values[skip:]
    if not values:
        raise BenchmarkError(
            f"the metric {name} was not found in {looked_for}"
            + (f" after {skip} steps to warm up" if skip else ""),
            where=str(file or "the command's output"),
            do="compare with what the command prints",
        )
    return [value * metric.scale for value in values]


def _reported(name: str, run: Finished, verb: str) -> list[float]:
    """What a verb of Penstock says."""
    report = _last_json(run.stdout)
    try:
        return READERS[verb][name](report, run)
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return []


def _fields(name: str, metric: Metric, run: Finished, file: Path | None) -> list[float]:
    """Numbers at a path of each JSON document that has it."""
    values: list[float] = []
    for document in _documents(run, file):
        value = _at(document, metric.json_ or "")
        if value is None:
            continue
        values.append(_number(name, value))
        if metric.per is not None:
            divisor = _at(document, metric.per)
            if not divisor:
                raise BenchmarkError(
                    f"the metric {name} is per {metric.per}, which is {divisor}",
                    where=str(file or "the command's output"),
                )
            values[-1] /= _number(name, divisor)
    return values


def _documents(run: Finished, file: Path | None) -> list[Any]:
    """JSON values to look in: of each line of a .jsonl, of a file, or the last one printed."""
    if file is None:
        last = _last_json(run.stdout)
        return [] if last is None else [last]
    text = _text(run, file)
    if file.suffix != ".jsonl":
        value = _parsed(text)
        return [] if value is None else [value]
    return [value for line in text.splitlines() if (value := _parsed(line)) is not None]


def _last_json(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """The last JSON object or list in a text, on one line or over several; None without one."""
    lines = text.splitlines()
    for start in reversed(range(len(lines))):
        if not lines[start].startswith(("{", "[")):
            continue
        for candidate in (lines[start], "\n".join(lines[start:])):
            value = _parsed(candidate)
            if isinstance(value, dict | list):
                return value
    return None


def _parsed(text: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _at(value: Any, path: str) -> Any:  # noqa: ANN401 - any JSON value
    """What is at a dotted path; a number chooses from a list; None where there is nothing."""
    for key in path.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _text(run: Finished, file: Path | None) -> str:
    """Where a metric is looked for; empty where the command left no such file."""
    if file is None:
        return run.output
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _number(name: str, value: Any) -> float:  # noqa: ANN401 - any JSON value, or a match
    """A finite number; thousands may be set apart by commas in text."""
    try:
        number = float(value.replace(",", "")) if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise BenchmarkError(f"the metric {name} is no number: {value}")
    return number
