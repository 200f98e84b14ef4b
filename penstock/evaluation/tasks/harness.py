"""Any task of lm-evaluation-harness, on local data, through an adapter of its own.

`evaluation/tasks/registry.py` lists it. The library is an optional dependency, imported when such
a task is made. It must never reach for a network.
"""

import importlib
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penstock.config.schema import EvaluateSection, GenerateSection
from penstock.errors import ConfigError, DataError
from penstock.evaluation.scoring import Request
from penstock.evaluation.tasks.task import Subject, TaskScores, continuation, shortened
from penstock.inference.engine import Engine

_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""File endings and the loader of `datasets` for each."""


class HarnessModel:
    """A subject as lm-evaluation-harness sees a model: text in, log-likelihoods and text out."""

    def __init__(self, subject: Subject) -> None:
        """Joined with the library's own base class, see `_adapter`."""
        super().__init__()
        self._subject = subject

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it."""
        subject = self._subject
        pairs = [continuation(subject.tokenizer, *request.args) for request in requests]
        answers = subject.scorer.predict(pairs, "harness")
        return [(-answer.loss, answer.all_hit) for answer in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each text after end-of-text, in windows that do not overlap but for
        the last, which has full context: the library's own definition.
        """
        subject = self._subject
        windows = [
            list(_rolling(self._whole(request.args[0]), subject.scorer.length))
            for request in requests
        ]
        flat = subject.scorer.predict(list(itertools.chain(*windows)), "harness")
        answers = iter(flat)
        return [-sum(next(answers).loss for _ in window) for window in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy continuations up to a stop string."""
        subject = self._subject
        engine = Engine(subject.model, subject.tokenizer)
        texts: list[str] = []
        for request in requests:
            prompt, settings = request.args
            until = settings.get("until") or []
            section = GenerateSection(
                tokens=int(settings.get("max_gen_toks", 256)),
                temperature=float(settings.get("temperature") or 0.0),
                stop=[until] if isinstance(until, str) else list(until),
            )
            prompt = shortened(subject.tokenizer, prompt, subject.scorer.length - section.tokens)
            texts.append(engine.generate([prompt], section, seed=0)[0].text)
        return texts

    def _whole(self, text: str) -> list[int]:
        tokenizer = self._subject.tokenizer
        return [*tokenizer.encode_prompt(""), *tokenizer.encode(text)]


def _rolling(tokens: Sequence[int], length: int) -> list[Request]:
    """Every token but the first as a target once: full windows, the last moved back."""
    stream, requests = np.array(tokens, np.int64), list[Request]()
    for first in range(0, len(tokens) - 1, length):
        end = min(first + length, len(tokens) - 1)
        requests.append(Request(stream[max(0, end - length) : end + 1], end - first))
    return requests


class Harness:
    """One task of the library, by its name."""

    def __init__(self, section: EvaluateSection, task: str) -> None:
        """Find the library, the task and its local data."""
        self.name = f"harness:{task}"
        self._limit = section.limit
        self._data = _data_files(section.task_data, task)
        manager = _library("lm_eval.tasks").TaskManager()
        if task not in manager.all_subtasks:
            kind = "a group of tasks" if task in manager.all_tasks else "no task"
            raise ConfigError(
                f"{task} is {kind} of lm-evaluation-harness",
                where="evaluate.tasks",
                do="name single tasks; `lm-eval ls tasks` lists them",
            )
        self._tasks = self._load(manager, task)

    def _load(self, manager: Any, task: str) -> Any:  # noqa: ANN401 - the library's types
        """The library's own task, its data replaced by the local files."""
        files = {split: str(path.resolve()) for split, path in self._data.items()}
        settings = {
            "include": str(manager.task_index[task].yaml_path),
            "dataset_path": _KINDS[next(iter(self._data.values())).suffix],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{task}.yaml")
            path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
            try:
                return manager.load(str(path))
            except (KeyError, ValueError, OSError) as error:
                raise DataError(
                    f"the local data does not fit the task {task}: {error!r}",
                    where="evaluate.task_data",
                    do="give the files of the task's own dataset, a split each",
                ) from None

    def run(self, subject: Subject) -> TaskScores:
        """Let the library ask the model, and take its figures and samples."""
        started = time.perf_counter()
        found = _library("lm_eval.evaluator").evaluate(
            _adapter(subject), self._tasks, limit=self._limit, bootstrap_iters=0
        )
        [(name, results)] = found["results"].items()
        metrics = {
            key.removesuffix(",none"): float(value)
            for key, value in results.items()
            if isinstance(value, int | float) and "stderr" not in key and key != "sample_len"
        }
        samples = found["samples"][name]
        return TaskScores(
            task=self.name,
            metrics={**metrics, "examples": len(samples)},
            settings={
                "data": str(next(iter(self._data.values())).parent),
                "sequence_length": subject.scorer.length,
            },
            examples=[_example(sample) for sample in samples],
            seconds=time.perf_counter() - started,
        )


def _example(sample: dict[str, Any]) -> dict[str, Any]:
    """What a person looks for in one of the library's samples."""
    record = {key: sample[key] for key in ("doc_id", "doc", "target", "filtered_resps")}
    if "acc" in sample:
        record["correct"] = bool(sample["acc"])
    return json.loads(json.dumps(record, default=str))


def _adapter(subject: Subject) -> Any:  # noqa: ANN401 - a class made from the library's
    base = _library("lm_eval.api.model").LM
    return type("PenstockModel", (HarnessModel, base), {})(subject)


def _library(module: str) -> Any:  # noqa: ANN401 - a module of an optional dependency
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"harness tasks need lm-evaluation-harness, which is not installed ({error.name})",
            where="evaluate.tasks",
            do="pip install 'penstock[harness]'",
        ) from None


def _data_files(task_data: str | None, task: str) -> dict[str, Path]:
    """Split → local file. A single file serves every split.

    Raises:
        DataError: none.
    """
    if task_data is not None and Path(task_data).suffix in _KINDS and Path(task_data).is_file():
        return dict.fromkeys(("train", "validation", "test"), Path(task_data))
    folder = Path(task_data or ".", task)
    files = sorted(path for path in folder.glob("*") if path.suffix in _KINDS)
    if task_data is None or not files:
        raise DataError(
            f"the task harness:{task} has no local data",
            where="evaluate.task_data",
            do=f"name a folder with {task}/test.jsonl (or .parquet), or the file itself",
        )
    return {path.stem: path for path in files}
