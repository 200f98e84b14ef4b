"""What benchmarks measured: statistics over rounds, and what changed since an earlier result.

`bench/runner.py` fills it, `bench/report.py` shows it. It must never run or draw anything.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from penstock.errors import ConfigError

FORMAT = "penstock bench results 1"
"""First thing checked in a file that is read."""
_PERCENTILES = (50, 90, 99)
_FEWEST = 4
"""Rounds on both sides below which nothing is said of a change: the noise is not known."""
_REDUCE: dict[str, Callable[[list[float]], float]] = {
    "median": lambda values: float(np.median(values)),
    "mean": lambda values: float(np.mean(values)),
    "min": min,
    "max": max,
    "last": lambda values: values[-1],
    "sum": math.fsum,
}


@dataclasses.dataclass
class Series:
    """One metric of one variant, over the counted rounds."""

    unit: str
    better: str | None
    """higher, lower, or None where neither is."""
    reduce: str = "median"
    """What the values of one run become."""
    values: list[float] = dataclasses.field(default_factory=list)
    """One figure a round."""
    samples: list[float] = dataclasses.field(default_factory=list)
    """All values of all rounds."""

    def add(self, values: list[float]) -> None:
        """Take in the values of one run."""
        self.values.append(_REDUCE[self.reduce](values))
        self.samples.extend(values)

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return float(np.median(self.values))

    @property
    def percentiles(self) -> dict[str, float]:
        """P50, p90 and p99 of all values (linear interpolation); empty with one value a run."""
        if len(self.samples) == len(self.values):
            return {}
        found = np.percentile(self.samples, _PERCENTILES)
        return {f"p{p}": float(value) for p, value in zip(_PERCENTILES, found, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """Everything but the single samples."""
        return {
            "unit": self.unit,
            "better": self.better,
            "values": self.values,
            "min": min(self.values),
            "median": self.median,
            "max": max(self.values),
            "samples": len(self.samples),
            "percentiles": self.percentiles,
        }


@dataclasses.dataclass
class BenchmarkResults:
    """What one benchmark measured."""

    name: str
    description: str
    baseline: str
    warmup_rounds: int
    rounds: int
    commands: dict[str, str]
    """Command line by variant."""
    series: dict[str, dict[str, Series]]
    """Variant → metric → figures."""

    def metrics(self) -> list[str]:
        """Names of all metrics, in the order of the specification."""
        return list(dict.fromkeys(name for metrics in self.series.values() for name in metrics))

    def ratio(self, variant: str, metric: str) -> float | None:
        """A variant's median over the baseline's; None for the baseline and where it has none."""
        base = self.series[self.baseline].get(metric)
        ours = self.series[variant].get(metric)
        if base is None or ours is None or variant == self.baseline or base.median == 0:
            return None
        return ours.median / base.median

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "description": self.description,
            "baseline": self.baseline,
            "warmup_rounds": self.warmup_rounds,
            "rounds": self.rounds,
            "variants": {
                variant: {
                    "command": self.commands[variant],
                    "metrics": {name: series.to_json() for name, series in metrics.items()},
                }
                for variant, metrics in self.series.items()
            },
        }


@dataclasses.dataclass(frozen=True)
class Change:
    """One figure beside an earlier one."""

    benchmark: str
    variant: str
    metric: str
    unit: str
    before: float
    after: float
    verdict: str
    """better, worse, changed (neither way is better), "within noise", or "too few rounds"."""

    @property
    def is_flagged(self) -> bool:
        """Whether the change is beyond the noise seen."""
        return self.verdict in ("better", "worse", "changed")

    @property
    def ratio(self) -> float | None:
        """After over before."""
        return self.after / self.before if self.before else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every figure that both results have; both as `read_results` gives them."""
    old = dict(_all_series(before))
    return [
        Change(*place, series["unit"], base["median"], series["median"], _verdict(base, series))
        for place, series in _all_series(after)
        if (base := old.get(place)) is not None
    ]


def _verdict(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A change counts when the ranges of the two do not touch.

    Were nothing different, that would happen by chance once in 35 comparisons of four rounds with
    four, and once in 126 of five with five (2 of C(2n, n) orders).
    """
    if min(len(before["values"]), len(after["values"])) < _FEWEST:
        return "too few rounds"
    rises, falls = after["min"] > before["max"], after["max"] < before["min"]
    if not (rises or falls):
        return "within noise"
    if after["better"] is None:
        return "changed"
    return "better" if rises == (after["better"] == "higher") else "worse"


def differing_environment(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What was not the same around the two results, each as "name: before → after"."""
    found: list[str] = []
    for section in ("environment", "versions"):
        old, new = before.get(section, {}), after.get(section, {})
        found += [
            f"{name}: {old.get(name)} → {new.get(name)}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
    return found


@dataclasses.dataclass(frozen=True)
class EarlierResults:
    """A results.json written before, to compare with."""

    path: Path
    values: dict[str, Any]


def read_results(path: Path) -> EarlierResults:
    """Read a results.json.

    Raises:
        ConfigError: missing, or no results of this format.
    """
    try:
        value = json.loads(path.read_bytes())
        whole = value["format"] == FORMAT and all(
            map(_is_series, dict(_all_series(value)).values())
        )
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", where="--compare") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole, value = False, {}
    if not whole:
        raise ConfigError(
            f"{path} is not a result of this version of `penstock bench`",
            where="--compare",
            do="give a results.json",
        )
    return EarlierResults(path, value)


def _is_series(value: dict[str, Any]) -> bool:
    """Whether everything a comparison reads is there, and is what it should be."""
    numbers = [value["median"], value["min"], value["max"], *value["values"]]
    return all(type(n) in (int, float) for n in numbers) and {"unit", "better"} <= value.keys()


def _all_series(results: dict[str, Any]) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    """((benchmark, variant, metric), figures) of a result in its JSON form."""
    for benchmark, content in results["benchmarks"].items():
        for variant, inner in content["variants"].items():
            for metric, series in inner["metrics"].items():
                yield (benchmark, variant, metric), series
