"""Run benchmarks: every variant in turns, each run a process of its own, figures read at once.

`api.bench` calls it. It must never know what the commands do.
"""

import contextlib
import datetime
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.bench.figures import figures, watch_of
from penstock.bench.jobs import BenchmarkJobs, Job
from penstock.bench.process import run_command
from penstock.bench.report import BenchResult, with_unit, write_results
from penstock.bench.results import (
    FORMAT,
    BenchmarkResults,
    EarlierResults,
    Series,
    compare,
    differing_environment,
)
from penstock.console import Progress, get_console
from penstock.errors import BenchmarkError
from penstock.report.summary import environment


def run_benchmarks(
    spec: Path,
    benchmarks: Sequence[BenchmarkJobs],
    folder: Path,
    earlier: EarlierResults | None = None,
) -> BenchResult:
    """Run benchmarks and write what they measured into `folder`.

    `spec` is the file they came from; the figures are compared with `earlier`. The files are
    written after each benchmark, so that a failure loses no other's figures.

    Raises:
        BenchmarkError: a command failed or a figure was not found.
    """
    values: dict[str, Any] = {
        "format": FORMAT,
        "spec": str(spec),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment(),
        "benchmarks": {},
    }
    result = BenchResult(folder, values)
    for benchmark in benchmarks:
        result.benchmarks.append(_run(benchmark, folder))
        values["benchmarks"][benchmark.name] = result.benchmarks[-1].to_json()
        if earlier is not None:
            result.changes = compare(earlier.values, values)
            result.differences = differing_environment(earlier.values, values)
            values["comparison"] = {
                "with": str(earlier.path),
                "differences": result.differences,
                "changes": [change.to_json() for change in result.changes],
            }
        write_results(result)
    return result


def _run(benchmark: BenchmarkJobs, folder: Path) -> BenchmarkResults:
    """All rounds of one benchmark."""
    settings, console = benchmark.settings, get_console()
    work = (folder / "work" / benchmark.name).resolve()
    work.mkdir(parents=True, exist_ok=True)
    has_setup = bool(benchmark.setup)
    with console.stage(f"{benchmark.name}: setup") if has_setup else contextlib.nullcontext():
        for number, job in enumerate(benchmark.setup, 1):
            _run_once(benchmark, job, work, folder / "output" / f"{benchmark.name}.setup-{number}")
    results = BenchmarkResults(
        name=benchmark.name,
        description=" ".join(settings.description.split()),
        baseline=benchmark.baseline,
        warmup_rounds=settings.warmup_rounds,
        rounds=settings.rounds,
        commands={job.variant: job.shown() for job in benchmark.jobs},
        series={
            job.variant: {
                name: Series(m.unit or "", m.better, m.reduce) for name, m in job.metrics.items()
            }
            for job in benchmark.jobs
        },
    )
    rounds = settings.warmup_rounds + settings.rounds
    with console.progress(benchmark.name, total=rounds * len(benchmark.jobs)) as progress:
        for number in range(rounds):
            # Each round starts with another variant, so that no one always follows the same one.
            start = number % len(benchmark.jobs)
            for job in (*benchmark.jobs[start:], *benchmark.jobs[:start]):
                log = folder / "output" / f"{benchmark.name}.{job.variant}.{number + 1}"
                found = _run_once(benchmark, job, work, log)
                if number >= settings.warmup_rounds:
                    for name, metric_values in found.items():
                        results.series[job.variant][name].add(metric_values)
                _tell(progress, results, job.variant, number, found)
    return results


def _run_once(benchmark: BenchmarkJobs, job: Job, work: Path, log: Path) -> dict[str, list[float]]:
    """One run of one variant in an empty folder; its figures by metric."""
    with tempfile.TemporaryDirectory(prefix="run-", dir=work) as scratch:
        folders = {"folder": scratch, "work": str(work)}
        run_folder = job.run_folder(folders) if job.verb == "train" else None
        files = {name: job.file_of(metric, folders) for name, metric in job.metrics.items()}
        watches = {
            name: watch_of(name, metric, files[name], run_folder)
            for name, metric in job.metrics.items()
        }
        wanted = [watch for watch in watches.values() if watch is not None]
        # Python holds back what it prints into a pipe; a watched line must come when it is written.
        unbuffered = {"PYTHONUNBUFFERED": "1"} if wanted else {}
        try:
            run = run_command(
                job.words(folders),
                environment={**unbuffered, **job.environment},
                timeout_seconds=benchmark.settings.timeout_seconds,
                log=log.with_name(f"{log.name}.txt"),
                watches=wanted,
            )
            return {
                name: figures(
                    name,
                    metric,
                    run,
                    verb=job.verb,
                    file=files[name],
                    watch=watches[name],
                    skip=job.warmup_steps,
                )
                for name, metric in job.metrics.items()
            }
        except BenchmarkError as error:
            what = f"benchmark {benchmark.name}, {job.variant}: {error.what}"
            raise BenchmarkError(what, where=error.where, do=error.do) from None


def _tell(
    progress: Progress,
    results: BenchmarkResults,
    variant: str,
    number: int,
    found: Mapping[str, list[float]],
) -> None:
    """A line about the run that has just ended."""
    seen = {
        name: with_unit(statistics.median(values), results.series[variant][name].unit)
        for name, values in found.items()
    }
    counted = number - results.warmup_rounds + 1
    name = f"round {counted}/{results.rounds}" if counted > 0 else "warm-up"
    figures_text = ", ".join(f"{metric} {text}" for metric, text in seen.items())
    get_console().info(f"{results.name}, {name}, {variant}: {figures_text}")
    progress.advance(1)
