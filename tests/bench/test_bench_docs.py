"""docs/bench.md: its example reads, and its tables name what there is."""

import re
from pathlib import Path

from penstock.bench.jobs import read_spec
from penstock.bench.reported import ANY_COMMAND, KNOWN, READERS
from penstock.bench.spec import Benchmark, Metric

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"## {title}")[1].split("\n## ")[0]


def test_the_example_reads(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    example = PAGE[PAGE.index("    benchmarks:") : PAGE.index("`benchmarks/small.yaml` is")]
    path.write_text(re.sub("^    ", "", example, flags=re.MULTILINE))
    (benchmark,) = read_spec(path)
    assert [job.variant for job in benchmark.jobs] == ["eager", "executable"]


def test_the_described_metrics_read() -> None:
    assert set(re.findall(r"\b(regex|until|json|reduce|file)\b:? ?", PAGE)) == {
        *("regex", "until", "json", "reduce", "file")
    }


def test_every_key_is_listed() -> None:
    listed = set(re.findall(r"`(\w+)`", section("Keys of a benchmark")))
    assert set(Benchmark.model_fields) <= listed
    described = set(re.findall(r"`(\w+)`", section("Metrics known by name")))
    assert {field.alias or name for name, field in Metric.model_fields.items()} <= described


def test_every_metric_is_listed_with_its_verbs() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section("Metrics known by name"), re.MULTILINE)
    told: dict[str, set[str]] = {}
    for names, verbs in rows:
        for name in re.findall(r"`(\w+)`", names):
            if name in KNOWN:
                told[name] = set(re.findall(r"`(\w+)`", verbs))
    there = {name: {v for v, readers in READERS.items() if name in readers} for name in KNOWN}
    assert told == there
    assert {name for name, verbs in there.items() if not verbs} == set(ANY_COMMAND)
