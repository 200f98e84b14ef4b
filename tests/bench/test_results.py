"""Statistics over rounds, the comparison with an earlier result, and figures out of outputs."""

import json
from pathlib import Path

import numpy as np
import pytest

from penstock.bench.figures import figures
from penstock.bench.process import Finished
from penstock.bench.results import BenchmarkResults, Series, compare, differing_environment
from penstock.bench.spec import Metric
from penstock.errors import BenchmarkError


def result(values: list[float], better: str | None = "higher") -> dict:
    series = Series("tokens/s", better)
    for value in values:
        series.add([value])
    benchmark = BenchmarkResults("b", "", "v", 0, len(values), {"v": ""}, {"v": {"m": series}})
    return {"benchmarks": {"b": benchmark.to_json()}}


@pytest.mark.parametrize(
    ("before", "after", "better", "verdict"),
    [
        ([10, 11, 12, 13], [14, 15, 16, 17], "higher", "better"),
        ([10, 11, 12, 13], [14, 15, 16, 17], "lower", "worse"),
        ([10, 11, 12, 13], [14, 15, 16, 17], None, "changed"),
        ([14, 15, 16, 17], [10, 11, 12, 13], "higher", "worse"),
        ([10, 11, 12, 13], [13, 15, 16, 17], "higher", "within noise"),
        ([10, 11, 12, 30], [14, 15, 16, 17], "higher", "within noise"),
        ([10, 11, 12], [24, 25, 26], "higher", "too few rounds"),
    ],
)
def test_a_change_counts_when_the_ranges_do_not_touch(
    before: list[float], after: list[float], better: str | None, verdict: str
) -> None:
    (change,) = compare(result(before, better), result(after, better))
    assert change.verdict == verdict
    assert change.is_flagged == (verdict in ("better", "worse", "changed"))
    assert change.ratio == float(np.median(after) / np.median(before))


def test_chance_alone_flags_as_rarely_as_is_said() -> None:
    draw = np.random.default_rng(0).random((4000, 2, 5))
    flagged = sum(compare(result(list(a)), result(list(b)))[0].is_flagged for a, b in draw)
    assert 0.3 / 126 < flagged / 4000 < 3 / 126


def test_percentiles_are_of_all_values_of_all_rounds() -> None:
    series, values = Series("s", "lower"), np.random.default_rng(1).random((4, 25))
    for row in values:
        series.add([float(value) for value in row])
    assert series.values == pytest.approx(np.median(values, axis=1))
    assert series.percentiles["p99"] == pytest.approx(np.quantile(values, 0.99))
    assert series.median == pytest.approx(np.median(np.median(values, axis=1)))


@pytest.mark.parametrize(
    ("reduce", "value"),
    [("median", 2.0), ("mean", 4.0), ("min", 1.0), ("max", 9.0), ("last", 9.0), ("sum", 12.0)],
)
def test_several_values_of_a_run_become_one(reduce: str, value: float) -> None:
    series = Series("", None, reduce)
    series.add([1.0, 2.0, 9.0])
    assert series.values == [value]


def test_other_machines_and_versions_are_named() -> None:
    old = {"environment": {"cores": 2}, "versions": {"torch": "2.12"}}
    new = {"environment": {"cores": 4}, "versions": {"torch": "2.12"}}
    assert differing_environment(old, new) == ["cores: 2 → 4"]


def test_generated_texts_of_one_batch_share_its_time() -> None:
    texts = [{"tokens": n, "seconds": s} for n, s in ((10, 2.0), (20, 2.0), (30, 3.0))]
    run = Finished(json.dumps(texts), json.dumps(texts, indent=1), 9.0, 1, {})

    def reported(name: str) -> list[float]:
        return figures(name, Metric(), run, verb="generate", file=None, watch=None, skip=0)

    assert reported("tokens_per_second") == [60 / 5]
    assert reported("samples_per_second") == [3 / 5]
    assert reported("latency_seconds") == [2.0, 2.0, 3.0]


def found(metric: Metric, stdout: str, name: str = "x", skip: int = 0) -> list[float]:
    run = Finished(stdout, stdout, 1.5, 7, {})
    return figures(name, metric, run, verb=None, file=None, watch=None, skip=skip)


def test_figures_are_found_in_what_a_command_prints() -> None:
    log = "step 1: 1,000.5 tokens/s\nstep 2: 2e3 tokens/s\n"
    speed = Metric(regex=r"([\d.,e]+) tokens/s", scale=0.5)
    assert found(speed, log) == [500.25, 1000.0]
    assert found(speed, log, skip=1) == [1000.0]
    text = 'noise {\n{"a": {"b": [1, 6]},\n "n": 3}\n'
    assert found(Metric.model_validate({"json": "a.b.1", "per": "n"}), text) == [2.0]
    assert found(Metric(), "", "wall_seconds") == [1.5]
    assert found(Metric(), "", "peak_memory_bytes") == [7.0]


@pytest.mark.parametrize(
    ("metric", "text", "message"),
    [
        ({"regex": r"speed (\S+)"}, "nothing", "was not found in"),
        ({"regex": r"speed (\S+)"}, "speed fast", "is no number: fast"),
        ({"regex": r"speed (\S+)"}, "speed nan", "is no number: nan"),
        ({"json": "a"}, '{"a": true}', "is no number: True"),
        ({"json": "a", "per": "b"}, '{"a": 1, "b": 0}', "is per b, which is 0"),
        ({"json": "a"}, "{", "was not found in a"),
    ],
)
def test_a_figure_that_is_not_there_is_an_error(metric: dict, text: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        found(Metric.model_validate(metric), text)


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"s": 1}\nbroken\n{"t": 5}\n{"s": 3}\n')
    run = Finished("", "", 0, 0, {})
    metric = Metric.model_validate({"json": "s", "file": "m"})
    values = figures("s", metric, run, verb=None, file=path, watch=None, skip=1)
    assert values == [3.0]
