"""From a specification to jobs: every variant with its command, values and metrics filled in.

`api.bench` calls it and `bench/runner.py` runs the jobs. Everything that can be wrong in a file is
found here, before anything runs; it must never start a process.
"""

import dataclasses
import itertools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.bench.graphcore import is_graphcore, translate
from penstock.bench.reported import KNOWN, available
from penstock.bench.spec import Benchmark, Metric, SpecFile, Variant
from penstock.config.document import Document, nearest
from penstock.config.reference import VERBS
from penstock.errors import ConfigError

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")
"""{{word}} stands for a literal {word}; other braces mean nothing."""
FOLDERS = {"folder": "{folder}", "work": "{work}"}
"""Placeholders that are known only when a run starts: an empty folder of its own, and one that
the runs and the setup of a benchmark share."""
_FIXED = ("python", "here")
"""Placeholders that are the same for every run: this Python, and the specification's folder."""
_FLAGS_WITH_VALUES = ("--config", "--trust")


@dataclasses.dataclass(frozen=True)
class Job:
    """One variant of a benchmark, ready to run but for its folders."""

    variant: str
    command: str
    values: Mapping[str, str]
    environment: Mapping[str, str]
    metrics: Mapping[str, Metric]
    warmup_steps: int = 0

    def words(self, folders: Mapping[str, str]) -> list[str]:
        """The command's words with every placeholder filled in.

        `penstock` is this very installation, whatever the search path says.
        """
        words = self._filled(folders)
        verb = _verb(words)
        if verb is None:
            return words
        if self.metrics and "--json" not in words:
            words.append("--json")
        key = "train.throughput_warmup_steps"
        if verb == "train" and self.warmup_steps and not any(w.startswith(key) for w in words):
            words.append(f"{key}={self.warmup_steps}")
        return [sys.executable, "-m", *words]

    @property
    def verb(self) -> str | None:
        """Penstock's verb that is run; None for another program."""
        return _verb(self._filled(FOLDERS))

    def run_folder(self, folders: Mapping[str, str]) -> Path | None:
        """The run folder the command line names."""
        found = [word[4:] for word in self._filled(folders) if word.startswith("run=")]
        return Path(found[-1]) if found else None

    def shown(self) -> str:
        """The command with its values filled in; what differs by machine and run is not."""
        return " ".join(self._filled({**FOLDERS, **{name: f"{{{name}}}" for name in _FIXED}}))

    def file_of(self, metric: Metric, folders: Mapping[str, str]) -> Path | None:
        """The file a metric is found in; None: the output."""
        return None if metric.file is None else Path(_fill(metric.file, self._values(folders)))

    def _values(self, folders: Mapping[str, str]) -> dict[str, str]:
        """Everything placeholders stand for; values may themselves name folders."""
        fixed = {**{name: self.values[name] for name in _FIXED}, **folders}
        return {**{name: _fill(value, fixed) for name, value in self.values.items()}, **fixed}

    def _filled(self, folders: Mapping[str, str]) -> list[str]:
        values = self._values(folders)
        # Words are cut first: what a value holds stays one word, whatever is in it.
        return [_fill(word, values) for word in shlex.split(self.command)]


@dataclasses.dataclass(frozen=True)
class BenchmarkJobs:
    """One benchmark with everything its variants leave open filled in."""

    name: str
    settings: Benchmark
    setup: list[Job]
    jobs: list[Job]
    baseline: str


def read_spec(path: Path, only: Sequence[str] = ()) -> list[BenchmarkJobs]:
    """Read and check a specification; with `only`, the benchmarks of these names.

    Raises:
        ConfigError: unreadable file, unknown key, metric, placeholder or benchmark, wrong value,
            missing command, variants that clash.
    """
    document = Document.read(path)
    if is_graphcore(document.value):
        document = translate(document)
    spec = document.check(SpecFile)
    names = list(spec.benchmarks)
    for name in only:
        if name not in names:
            raise ConfigError(
                f"there is no benchmark {name}", where=str(path), do=nearest(name, names)
            )
    found = [_Reader(document, name, spec.benchmarks[name]).read() for name in names]
    return [benchmark for benchmark in found if not only or benchmark.name in only]


class _Reader:
    """Fills in what the variants of one benchmark leave open, and checks every name."""

    def __init__(self, document: Document, name: str, settings: Benchmark) -> None:
        self.document, self.name, self.settings = document, name, settings
        self.place = ("benchmarks", name)
        self.fixed = {"python": sys.executable, "here": str(document.path.resolve().parent)}

    def read(self) -> BenchmarkJobs:
        """The benchmark's jobs."""
        settings = self.settings
        baseline = settings.baseline or next(iter(settings.variants))
        if baseline not in settings.variants:
            raise self._wrong(
                f"there is no variant {baseline}",
                ("baseline",),
                nearest(baseline, list(settings.variants)),
            )
        values = {**settings.values, **self.fixed}
        setup = [Job("setup", line, values, settings.environment, {}) for line in settings.setup]
        for index, job in enumerate(setup):
            self._check_placeholders(job, ("setup", str(index)))
        jobs = [self._job(name, given or Variant()) for name, given in settings.variants.items()]
        self._refuse_clashes(jobs)
        return BenchmarkJobs(self.name, settings, setup, jobs, baseline)

    def _job(self, name: str, variant: Variant) -> Job:
        """One variant."""
        settings, place = self.settings, ("variants", name)
        command = variant.command or settings.command
        if command is None or not command.split():
            raise self._wrong(
                f"{'.'.join((*self.place, *place))} has no command",
                place,
                f"set {'.'.join(self.place)}.command, or one of the variant's own",
            )
        given = {**settings.metrics, **variant.metrics}
        job = Job(
            name,
            command,
            {**settings.values, **variant.values, **self.fixed},
            {**settings.environment, **variant.environment},
            {metric: description or Metric() for metric, description in given.items()},
            settings.warmup_steps,
        )
        self._check_placeholders(job, place)
        texts = " ".join([command, *(m.file or "" for m in job.metrics.values())])
        for value in variant.values:
            if f"{{{value}}}" not in texts:
                raise self._wrong(
                    f"the command does not use the value {value}",
                    (*place, "values", value),
                    f"write {{{value}}} into the command where it belongs",
                )
        metrics = {m: self._metric(job, m, description) for m, description in job.metrics.items()}
        self._check_training(job, place)
        return dataclasses.replace(job, metrics=metrics)

    def _metric(self, job: Job, name: str, given: Metric) -> Metric:
        """A metric with the unit and direction its name says, where it is known."""
        known, verb = KNOWN.get(name), job.verb
        if not given.is_described and name not in available(verb):
            own = self.settings.variants[job.variant] or Variant()
            inner = ("variants", job.variant) if name in own.metrics else ()
            program = "another program" if verb is None else f"penstock {verb}"
            what = f"there is no metric {name}"
            if known is not None:
                what = f"{program} reports no {name}, which variant {job.variant} is asked for"
            raise self._wrong(
                what,
                (*inner, "metrics", name),
                f"{nearest(name, available(verb))} Else describe it by json, regex or until",
            )
        if known is None:
            return given
        missing: dict[str, Any] = {"unit": known.unit, "better": known.better}
        return given.model_copy(update={k: v for k, v in missing.items() if not getattr(given, k)})

    def _check_training(self, job: Job, place: tuple[str, ...]) -> None:
        """A run folder that is not new each time would be found trained already, and old figures
        be read again.
        """
        if job.verb != "train":
            return
        run = job.run_folder(FOLDERS)
        if run is None or FOLDERS["folder"] not in str(run):
            raise self._wrong(
                f"variant {job.variant} trains into one folder again and again",
                (*place, "command"),
                "write run={folder}/run: {folder} is new for each run",
            )

    def _check_placeholders(self, job: Job, place: tuple[str, ...]) -> None:
        """Refuse a command or file with a placeholder that nothing fills."""
        try:
            verb = job.verb
            for metric in job.metrics.values():
                job.file_of(metric, FOLDERS)
        except KeyError as error:
            key = str(error.args[0])
            raise self._wrong(
                f"nothing fills the placeholder {{{key}}}",
                (*place, "command"),
                f"{nearest(key, sorted({*job.values, *FOLDERS}))} Write {{{{{key}}}}} for the "
                "braces themselves",
            ) from None
        except ValueError as error:
            raise self._wrong(
                f"the command cannot be cut into words: {error}", (*place, "command")
            ) from None
        if verb is not None and verb not in VERBS:
            raise self._wrong(
                f"there is no verb {verb}", (*place, "command"), nearest(verb, list(VERBS))
            )

    def _refuse_clashes(self, jobs: Sequence[Job]) -> None:
        """Two variants that are the same thing measure nothing."""
        seen: dict[tuple[object, ...], str] = {}
        for job in jobs:
            same = (*job.words(FOLDERS), "", *sorted(job.environment.items()))
            if same in seen:
                raise self._wrong(
                    f"the variants {seen[same]} and {job.variant} run the same command",
                    ("variants", job.variant),
                    "give each its own values, command or environment",
                )
            seen[same] = job.variant

    def _wrong(self, what: str, place: tuple[str, ...], do: str | None = None) -> ConfigError:
        return ConfigError(
            f"benchmark {self.name}: {what}",
            where=self.document.where(*self.place, *place),
            do=do,
        )


def _verb(words: Sequence[str]) -> str | None:
    """The verb, where a command is one of Penstock's."""
    if not words or words[0] != "penstock":
        return None
    named = itertools.pairwise(words)
    free = (w for before, w in named if not w.startswith("-") and before not in _FLAGS_WITH_VALUES)
    return next(free, "")


def _fill(text: str, values: Mapping[str, str]) -> str:
    """A text with its placeholders filled in.

    Raises:
        KeyError: a placeholder without a value.
    """

    def value(match: re.Match[str]) -> str:
        return f"{{{match[1]}}}" if match[1] is not None else values[match[2]]

    return _PLACEHOLDER.sub(value, text)
