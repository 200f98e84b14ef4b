"""`penstock bench` from end to end: real processes, real figures, files, failures."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.bench.process import run_command
from penstock.cli import main
from penstock.errors import BenchmarkError
from tests.test_cli import fails

ROOT = Path(__file__).resolve().parents[2]


def script(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    path.write_text(text)
    return path


@pytest.mark.slow
def test_the_small_benchmark_measures_eager_and_executable(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The specification of the docs, at the tiniest size and for two rounds."""
    text = (ROOT / "benchmarks" / "small.yaml").read_text()
    for before, after in (
        (r"source\.kind=stdlib", f"source.path={corpus}"),
        ("preset: gpt2-demo", "preset: gpt2-tiny"),
        ("vocabulary: 4096", "vocabulary: 512"),
        ("length: 256", "length: 64"),
        ("rounds: 5", "rounds: 2"),
        ("warmup_rounds: 1", "warmup_rounds: 0"),
        ("format: bf16", "format: fp32"),
        (r"train\.steps=12", "train.steps=5"),
    ):
        text, count = re.subn(before, after, text)
        assert count, before
    spec, out = tmp_path / "small.yaml", tmp_path / "out"
    spec.write_text(text)
    words = ["bench", str(spec), "--benchmark", "training", f"out={out}"]
    assert main([*words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["environment"]["cores"] >= 1
    variants = value["benchmarks"]["training"]["variants"]
    for variant in ("eager", "executable"):
        metrics = variants[variant]["metrics"]
        speed, samples = (metrics[n] for n in ("tokens_per_second", "samples_per_second"))
        assert samples["median"] == pytest.approx(speed["median"] / 64)
        assert len(speed["values"]) == 2
        assert speed["min"] <= speed["median"] <= speed["max"]
        steps = metrics["step_seconds"]
        assert steps["samples"] == 2 * 3, "five steps, two of them to warm up"
        assert steps["percentiles"]["p50"] <= steps["percentiles"]["p99"]
        assert 0 < metrics["mfu"]["median"] < 100
        assert metrics["startup_seconds"]["min"] > steps["min"]
        assert metrics["peak_memory_bytes"]["min"] > 100 << 20
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {row["variant"] for row in rows} == {"eager", "executable"}
    assert "| tokens_per_second | executable |" in (out / "results.md").read_text()
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not list((out / "work" / "training").glob("run-*")), "runs leave nothing behind"


def test_a_foreign_command_is_measured_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = script(
        tmp_path,
        "import os, time\nprint('ready', flush=True)\ntime.sleep(0.2)\n"
        "print('speed', os.environ['SPEED'])\n",
    )
    spec, out = tmp_path / "spec.yaml", tmp_path / "out"
    spec.write_text(
        f"""
        benchmarks:
          foreign:
            command: "{{python}} {program}"
            rounds: 4
            warmup_rounds: 0
            metrics:
              speed: {{regex: 'speed (.*)', unit: turns/s, better: higher}}
              ready: {{until: ready, unit: s}}
              wall_seconds:
            variants:
              slow: {{environment: {{SPEED: 3}}}}
              fast: {{environment: {{SPEED: 6}}}}
        """
    )
    words = ["bench", str(spec), f"out={out}"]
    assert main(words) == 0
    first = json.loads((out / "results.json").read_text())
    metrics = first["benchmarks"]["foreign"]["variants"]["slow"]["metrics"]
    assert metrics["speed"]["values"] == [3, 3, 3, 3]
    assert metrics["wall_seconds"]["min"] > 0.2
    assert metrics["ready"]["max"] < metrics["wall_seconds"]["max"] - 0.15
    assert "2.00×" in (out / "results.md").read_text()
    spec.write_text(spec.read_text().replace("SPEED: 6", "SPEED: 2"))
    capsys.readouterr()
    assert main([*words, "--compare", str(out / "results.json")]) == 0
    err = capsys.readouterr().err
    assert "Changes beyond the noise" in err
    second = json.loads((out / "results.json").read_text())["comparison"]
    verdicts = {(c["variant"], c["metric"]): c["verdict"] for c in second["changes"]}
    assert verdicts["fast", "speed"] == "worse"
    assert verdicts["slow", "speed"] == "within noise"


def test_a_file_of_graphcore_s_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = script(
        tmp_path,
        "for speed in (900, 1_200):\n    print(f'loss: 3.5, acc: 0.1, Throughput: {speed:,}.5 ')\n",
    )
    path = tmp_path / "benchmarks.yml"
    path.write_text(
        f"""---
train_options: &train_options
  data:
    throughput:
      reduction_type: "final"
      regexp: 'Throughput: ([0-9, .]*)'
    loss:
      reduction_type: "mean"
      regexp: "loss: *(.*?),"
  output:
    - [samples/sec, "throughput"]
    - [Loss, "loss"]

pytorch_gpt2_small:
  <<: *train_options
  description: |
    GPT2 Small training.
  cmd: >-
    {sys.executable} {program}
      --layers-per-ipu 0 4 4 4
"""
    )
    out = tmp_path / "out"
    assert main(["bench", str(path), f"out={out}"]) == 0
    value = json.loads((out / "results.json").read_text())["benchmarks"]["pytorch_gpt2_small"]
    metrics = value["variants"]["default"]["metrics"]
    assert value["description"] == "GPT2 Small training."
    assert (metrics["throughput"]["values"], metrics["throughput"]["unit"]) == (
        [1200.5],
        "samples/sec",
    )
    assert metrics["loss"]["values"] == [3.5]
    path.write_text(path.read_text().replace("description:", "parameters: {a: [1, 2]}\n  x:"))
    assert "benchmarks.yml:16)" in fails(capsys, "bench", str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nprint('x' * 9)\nsys.exit('out of turbines')", "exit code 1: out of turbines"),
        ("import os\nos.kill(os.getpid(), 9)", "signal SIGKILL: it printed nothing"),
        ("print('no figure')", "the metric speed was not found"),
        ("import time\ntime.sleep(60)", "took longer than 1 s"),
    ],
)
def test_a_failing_command_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"""
        benchmarks:
          failing:
            command: "{{python}} {script(tmp_path, text)}"
            timeout_seconds: {1 if "sleep" in text else 60}
            metrics: {{speed: {{regex: 'speed (.*)'}}}}
        """
    )
    line = fails(capsys, "bench", str(spec), f"out={tmp_path / 'out'}")
    assert "benchmark failing, default" in line
    assert message in line


def test_penstock_s_own_mistakes_are_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        """
        benchmarks:
          failing:
            command: penstock train model.preset=gtp2 run={folder}/run
            metrics: [mfu]
        """
    )
    line = fails(capsys, "bench", str(spec), f"out={tmp_path / 'out'}")
    assert "exit code 2: penstock: " in line
    missing = spec.read_text().replace("penstock train", "no-such-program").replace("mfu", "")
    spec.write_text(missing.replace("[]", "[wall_seconds]"))
    assert "cannot be started" in fails(capsys, "bench", str(spec), f"out={tmp_path / 'out'}")


def test_memory_counts_the_children(tmp_path: Path) -> None:
    child = "import time; x = b'x' * (150 << 20); time.sleep(0.5)"
    parent = (
        "import subprocess, sys\n"
        f"a = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(2)]\n"
        "[p.wait() for p in a]\n"
    )
    words = [sys.executable, "-c", parent]
    run = run_command(words, environment={}, timeout_seconds=60, log=tmp_path / "log")
    assert 300 << 20 < run.peak_memory_bytes < 480 << 20


def test_nothing_is_left_running(tmp_path: Path) -> None:
    words = ["sh", "-c", "sleep 300 & echo $!; exit 3"]
    with pytest.raises(BenchmarkError, match="exit code 3"):
        run_command(words, environment={}, timeout_seconds=60, log=tmp_path / "log")
    pid = (tmp_path / "log").read_text().strip()
    state = subprocess.run(["ps", "-o", "stat=", pid], capture_output=True, text=True, check=False)
    assert state.stdout.strip() in ("", "Z", "Zs")
