"""Help text and reference pages, generated from the schema's own docstrings.

`cli.py` prints it, `make docs` writes it to docs/configuration.md, a test compares the two.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from penstock.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    summary: str
    usage: str
    sections: tuple[str, ...]
    """Config sections and root keys it reads."""
    flags: tuple[tuple[str, str], ...] = ()
    """Flags of its own, each with its meaning."""


_MODEL = ("model", "lora", "batch", "data", "precision", "plan", "device")
VERBS: dict[str, Verb] = {
    "prepare": Verb(
        "Raw text to a dataset: tokenizer, token files, manifest.",
        "penstock prepare source.path=my_texts/ tokenizer.train=true data.path=DATASET",
        ("source", "clean", "tokenizer", "data", "prepare", "ray", "seed"),
    ),
    "plan": Verb(
        "Whether a training step fits this machine, with numbers, before anything is allocated.",
        "penstock plan model.preset=gpt2 batch.micro=4 data.sequence_length=512",
        (*_MODEL, "mode", "generate", "optimizer", "checkpoint", "compile", "run", "out"),
    ),
    "compile": Verb(
        "Compile a plan's regions to one signed file of machine code.",
        "penstock compile model.preset=gpt2 data.sequence_length=512 executable=FILE",
        (*_MODEL, "mode", "generate", "run", "compile", "executable"),
    ),
    "train": Verb(
        "Train, resuming where an earlier run stopped.",
        "penstock train executable=FILE data.path=DATASET run=RUN train.steps=100",
        (
            *_MODEL,
            "optimizer",
            "schedule",
            "train",
            "checkpoint",
            "launch",
            "evaluate",
            "compile",
            "executable",
            "run",
            "seed",
            "trust",
        ),
        (
            ("--processes N", "launch.processes=N"),
            ("--hosts FILE", "launch.hosts and launch.address of a host file; start it on each"),
        ),
    ),
    "launch": Verb(
        "Start training on every host of a file, over ssh.",
        "penstock launch --hosts FILE [--dry-run] train KEYS…",
        ("launch",),
        (
            ("--hosts FILE", "a host a line: NAME, NAME:PROCESSES or NAME slots=PROCESSES"),
            ("--dry-run", "only show the command of each host"),
        ),
    ),
    "evaluate": Verb(
        "Held-out perplexity, and tasks: WikiText, LAMBADA, SST-2, lm-evaluation-harness.",
        "penstock evaluate run=RUN data.path=DATASET evaluate.split=test, or "
        "penstock evaluate run=RUN tasks=[wikitext,lambada] task_data=FOLDER",
        (
            "evaluate",
            "data",
            "tokenizer",
            "run",
            "executable",
            "model",
            "lora",
            "batch",
            "precision",
            "plan",
            "checkpoint",
            "compile",
            "device",
            "trust",
        ),
    ),
    "generate": Verb(
        "Continue prompts: one, a file of them, or interactively.",
        "penstock generate run=RUN generate.prompt='def add(' generate.tokens=40",
        (
            "generate",
            "run",
            "checkpoint",
            "executable",
            "model",
            "lora",
            "tokenizer",
            "precision",
            "seed",
            "device",
            "trust",
        ),
    ),
    "convert": Verb(
        "A run's weights for `transformers`, its adapters for `peft`, or a dataset's format.",
        "penstock convert checkpoint run=RUN out=FOLDER, or "
        "penstock convert adapter run=RUN out=FOLDER, or "
        "penstock convert dataset from=PATH out=FOLDER data.format=FORMAT",
        ("run", "checkpoint", "from_", "out", "data", "tokenizer"),
    ),
    "import-config": Verb(
        "Another system's configuration in our keys, and what became of each of theirs.",
        "penstock import-config FILE --from "
        "sambanova|cerebras|graphcore|habana|deepspeed|accelerate [out=FILE.yaml]",
        ("from_", "out"),
    ),
    "inspect": Verb(
        "What an executable, a dataset (in any format) or a run holds.",
        "penstock inspect FILE_OR_FOLDER [out=PAGE.html]",
        ("trust", "out", "tokenizer"),
    ),
    "report": Verb("Write a run's HTML report again.", "penstock report run=RUN", ("run",)),
    "bench": Verb(
        "Run the benchmarks of a YAML file in turns, and compare with an earlier result.",
        "penstock bench SPEC.yaml [--benchmark NAME] [--compare FILE] [out=FOLDER]",
        ("out",),
        (
            ("--benchmark NAME", "run this one only; may be repeated"),
            ("--compare FILE", "an earlier results.json: flag changes beyond the noise"),
        ),
    ),
    "profile": Verb(
        "Where the time of some steps of training or generation goes: regions, kernels, memory.",
        "penstock profile executable=FILE data.path=DATASET out=FOLDER, or "
        "penstock profile mode=generate run=RUN generate.prompt=TEXT out=FOLDER",
        (
            *_MODEL,
            "profile",
            "mode",
            "generate",
            "optimizer",
            "train",
            "launch",
            "compile",
            "executable",
            "run",
            "tokenizer",
            "checkpoint",
            "seed",
            "out",
            "trust",
        ),
        (("--processes N", "launch.processes=N: each recorded, as train divides the job"),),
    ),
    "doctor": Verb(
        "What this machine is and how fast, and whether everything is in place.",
        "penstock doctor",
        ("device",),
    ),
}


def verb_help(verb: str | None) -> str:
    """Help for one verb, with every key it reads; or the list of verbs."""
    if verb is None:
        lines = ["Penstock: raw text to a trained, generating language model.", ""]
        lines += ["usage: penstock VERB [--config FILE] [key.sub=value …] [--json] [--quiet]", ""]
        lines += [f"  {name:10} {facts.summary}" for name, facts in VERBS.items()]
        lines += ["", "penstock VERB --help lists the keys a verb reads."]
        return "\n".join(lines)
    facts = VERBS[verb]
    lines = [facts.summary, "", f"usage: {facts.usage}", ""]
    lines += [
        "flags: --config FILE  YAML with any of the keys below",
        "       --json         result as JSON on standard output",
    ]
    lines += [
        "       --quiet        only warnings and results",
        "       --trust SHA256 run this very executable file, whoever made it; may be repeated",
        *(f"       {flag}  {meaning}" for flag, meaning in facts.flags),
        "       --help, --version",
        "",
        "keys:",
    ]
    for key, kind, default, meaning in _entries(facts.sections):
        lines += [f"  {key} = {default}   ({kind})", f"      {meaning}"]
    return "\n".join(lines)


def markdown_reference() -> str:
    """docs/configuration.md: every key with type, default and meaning."""
    lines = ["# Configuration", "", "Generated from the schema by `make docs`; do not edit.", ""]
    lines += ["Every verb takes these keys from `--config FILE` (YAML) and as `key.sub=value`.", ""]
    for name, field in Config.model_fields.items():
        section = _section(field)
        if section is None:
            continue
        lines += [f"## {name}", "", " ".join((section.__doc__ or "").split()), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(*entry) for entry in _entries((name,))]
        lines.append("")
    roots = [name for name, field in Config.model_fields.items() if _section(field) is None]
    lines += [
        "## Keys without a section",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    lines += [_row(*entry) for entry in _entries(roots)]
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON Schema of the whole config, for editors."""
    return Config.model_json_schema(by_alias=True)


def _row(key: str, kind: str, default: str, meaning: str) -> str:
    escaped = r"\|"  # a bar would end the table's cell
    return (
        f"| `{key}` | {kind.replace('|', 'or')} | `{default}` | {meaning.replace('|', escaped)} |"
    )


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _entries(names: typing.Iterable[str]) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key in these sections."""
    for name in names:
        section = _section(Config.model_fields[name])
        fields = {name: Config.model_fields[name]} if section is None else section.model_fields
        prefix = "" if section is None else f"{name}."
        for leaf, field in fields.items():
            default = field.get_default(call_default_factory=True)
            meaning = " ".join((field.description or "").split())
            yield prefix + (field.alias or leaf), _kind(field.annotation), _shown(default), meaning


def _shown(value: Any) -> str:  # noqa: ANN401 - any default
    """A default as a user writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _kind(annotation: Any) -> str:  # noqa: ANN401 - any annotation
    """A type as a user writes it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_kind(item) for item in inner)
    if origin is typing.Literal:
        return " | ".join(str(item) for item in inner)
    if origin is typing.Annotated:
        return _kind(inner[0])
    if origin in (list, tuple):
        return f"list of {_kind(inner[0])}"
    names = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(annotation, str(annotation))
