"""One evaluation from config to figures: everything `api.evaluate` opens, scores and records.

The tasks are in `evaluation/`; this module gathers what they work on. With `api.py`, `jobs.py` and
`train_run.py` it is the only one that sees the whole `Config`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from penstock import jobs, planning, runs
from penstock.compiler.plan import Plan
from penstock.config.schema import Config, ModelSection
from penstock.console import get_console
from penstock.data.dataset import Dataset
from penstock.data.objective import objective_for
from penstock.data.tokenizer import Tokenizer
from penstock.errors import ConfigError, MissedTargetError
from penstock.evaluation.compression import compressor_bits
from penstock.evaluation.masked import evaluate_masked
from penstock.evaluation.perplexity import evaluate_split
from penstock.evaluation.scoring import Scorer
from penstock.evaluation.tasks.registry import PERPLEXITY, make_tasks
from penstock.evaluation.tasks.task import Subject, Task, TaskScores
from penstock.files import atomic_write
from penstock.models.hub import model_folder
from penstock.models.quantization import round_weights
from penstock.report.page import write_report
from penstock.report.summary import RunSummary
from penstock.results import ComparisonResult, EvaluationResult
from penstock.training.run_folder import RunFolder


def evaluate_run(config: Config) -> EvaluationResult | ComparisonResult:
    """Score a run or a model on the tasks, and others beside it; see `api.evaluate`.

    Raises:
        MissedTargetError: an accuracy is below `evaluate.min_accuracy`; everything was recorded.
    """
    tasks = make_tasks(config.evaluate)
    chosen = [config, *(_other(config, path) for path in config.evaluate.compare)]
    named = {_name(one): one for one in chosen}
    if len(named) < len(chosen):
        raise ConfigError(
            "a model is compared with itself",
            where="evaluate.compare",
            do="name other runs or folders",
        )
    results = {name: _evaluate(one, tasks) for name, one in named.items()}
    for name, result in results.items():
        _record(named[name], result, name if len(named) > 1 else None)
    first = next(iter(results.values()))
    _require_accuracy(first, config.evaluate.min_accuracy)
    return first if len(results) == 1 else ComparisonResult(results)


def _name(config: Config) -> str:
    """What a model is called beside others."""
    use = config.checkpoint.use
    step = f", step {use}" if isinstance(use, int) else ", best" if use == "best" else ""
    return str(config.model.from_ or f"{config.run}{step}")


def _other(config: Config, path: str) -> Config:
    """The same evaluation of another run, of one of its checkpoints, or of a model in the Hugging
    Face layout.
    """
    folder = Path(path)
    checkpoint = config.checkpoint.model_copy(update={"use": "newest"})
    if folder.parent.name == "checkpoints" and folder.name.removeprefix("step-")[:8].isdigit():
        step = int(folder.name.removeprefix("step-")[:8])
        checkpoint = config.checkpoint.model_copy(update={"use": step})
        path = str(folder.parent.parent)
    if RunFolder(path).config.is_file():
        update = {"run": path, "model": ModelSection(), "checkpoint": checkpoint}
    else:
        update = {"run": None, "model": ModelSection.model_validate({"from": path})}
    return config.model_copy(update={**update, "executable": None})


def _evaluate(config: Config, tasks: Sequence[Task]) -> EvaluationResult:
    """All tasks on one model."""
    wants_split = PERPLEXITY in config.evaluate.tasks
    dataset = planning.open_dataset(config) if wants_split else None
    subject, plan = _subject(config, dataset)
    if tasks and not subject.model.architecture.is_causal:
        raise ConfigError(
            f"{', '.join(task.name for task in tasks)}: only causal models continue text",
            where="evaluate.tasks",
            do="evaluate a causal model, or perplexity alone",
        )
    result = EvaluationResult(None, None, {}, [])
    if dataset is not None and not plan.architecture.is_causal:
        return dataclasses.replace(result, tasks=[_masked(config, dataset, subject, plan)])
    if dataset is not None:
        split = dataset.split(config.evaluate.split)
        scores = evaluate_split(
            subject.model,
            split,
            sequence_length=subject.scorer.length,
            stride=config.evaluate.stride,
            batch=subject.batch,
            by_document=plan.attention == "document",
        )
        wanted = config.evaluate.compressors
        bits = compressor_bits(split, dataset.tokenizer()) if wanted else {}
        result = EvaluationResult(split.name, scores, bits, [])
    return dataclasses.replace(result, tasks=[task.run(subject) for task in tasks])


def _masked(config: Config, dataset: Dataset, subject: Subject, plan: Plan) -> TaskScores:
    """A masked model on held-out text; the hidden tokens are always the same."""
    split, probability = dataset.split(config.evaluate.split), config.train.mask_probability
    objective = objective_for(
        dataset,
        is_causal=False,
        by_document=plan.attention == "document",
        probability=probability,
        seed=config.seed,
    )
    return evaluate_masked(
        subject.model,
        split,
        objective,
        sequence_length=subject.scorer.length,
        batch=subject.batch,
        settings={"split": split.name, "mask_probability": probability, "seed": config.seed},
    )


def _subject(config: Config, dataset: Dataset | None) -> tuple[Subject, Plan]:
    """The model, its tokenizer, kernels where there are any for it, and what it was planned by."""
    source, is_rounded = config.model.from_, config.precision.weights == "int8"
    if source is not None:
        # The figures of weights that others publish are those of float32.
        exact = config.precision.model_copy(update={"compute": config.precision.compute or "fp32"})
        config = config.model_copy(update={"precision": exact})
        plan = planning.plan_of(config, dataset)
        if dataset is not None:
            planning.require_tokenizer_of_model(config, dataset)
        model, _ = jobs.new_model(config, plan, None)
        folder = config.tokenizer.from_ or model_folder(source)
        tokenizer = (
            Tokenizer.load(folder, config.tokenizer.bos) if dataset is None else dataset.tokenizer()
        )
        length, rows = plan.sequence_length, None
    else:
        loaded = runs.load_run(config)
        if dataset is not None:
            runs.require_same_tokenizer(loaded.tokenizer.sha256, dataset, f"the run {config.run}")
        tokenizer, plan = loaded.tokenizer, loaded.plan
        compute, device = config.precision.compute or plan.compute, planning.device_of(config)
        model = loaded.model(compute, device, merged=is_rounded)
        length = config.data.sequence_length or plan.sequence_length
        fits = length == plan.sequence_length and not is_rounded
        rows = runs.attach_for_evaluation(config, loaded, model) if fits else None
    if length > model.architecture.max_positions:
        raise ConfigError(
            f"the model takes {model.architecture.max_positions} tokens, not {length}",
            where="data.sequence_length",
            do="evaluate with a shorter length",
        )
    model.requires_grad_(False)
    if is_rounded:
        round_weights(model)
    batch = rows or config.evaluate.batch
    scorer = Scorer(
        model,
        length=length,
        batch=batch,
        is_fixed=rows is not None,
        by_document=plan.attention == "document",
    )
    return Subject(model, tokenizer, scorer, batch), plan


def _record(config: Config, result: EvaluationResult, name: str | None) -> None:
    """Write what was found into the run, and into the output folder."""
    output = config.evaluate.output
    is_of_run = config.run is not None and config.model.from_ is None
    if is_of_run and isinstance(config.checkpoint.use, int):
        # Figures of a step on the way are not the run's own.
        if result.tasks:
            _write(Path(str(config.run), "evaluation", f"step-{config.checkpoint.use}"), result)
    elif is_of_run and config.run is not None:
        folder = Path(config.run, "evaluation")
        summary = RunSummary.read(Path(config.run))
        summary.values.update(result.summary(summary.values))
        summary.write()
        write_report(Path(config.run))
        if result.tasks:
            _write(folder, result)
    if output is not None:
        _write(Path(output) if name is None else Path(output, _file_name(name)), result)


def _write(folder: Path, result: EvaluationResult) -> None:
    """results.json, and a JSON lines file of each task's examples."""
    for task in result.tasks:
        lines = "".join(json.dumps(example) + "\n" for example in task.examples)
        atomic_write(folder / f"{_file_name(task.task)}.jsonl", lines)
    atomic_write(folder / "results.json", json.dumps(result.json(), indent=2) + "\n")
    get_console().path("results", folder / "results.json")


def _file_name(name: str) -> str:
    """A name with nothing in it that a path could mistake."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.")


def _require_accuracy(result: EvaluationResult, least: float | None) -> None:
    """Fail the job where a task's accuracy is below what was asked for."""
    if least is None:
        return
    found = {t.task: t.metrics["accuracy"] for t in result.tasks if "accuracy" in t.metrics}
    if not found:
        raise ConfigError(
            "none of the tasks has an accuracy",
            where="evaluate.min_accuracy",
            do="evaluate sst2 or lambada, or leave it out",
        )
    for name, accuracy in found.items():
        if accuracy < least:
            result.show(get_console())
            raise MissedTargetError(
                f"{name}: accuracy {accuracy:.4f} is below {least}",
                where="evaluate.min_accuracy",
                do="train longer, or ask for less",
            )
