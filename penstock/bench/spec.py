"""What a YAML file of named benchmarks may say: every key, its type, default and meaning.

`bench/jobs.py` reads files into these models. It must never know how anything is run.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from penstock.config.document import DocumentSection

_NAME = r"^\w[\w.+ -]*$"
"""Names of benchmarks and variants: they become parts of file names."""


def _as_text(value: Any) -> Any:  # noqa: ANN401 - any scalar of the file
    """A scalar as it is written on a command line; all else is left for the schema to refuse."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _as_mapping(value: Any) -> Any:  # noqa: ANN401 - whatever the file holds
    """A list of names as a mapping of names to nothing further."""
    return dict.fromkeys(value) if isinstance(value, list) else value


Text = Annotated[str, BeforeValidator(_as_text)]
Name = Annotated[str, Field(pattern=_NAME)]


class Metric(DocumentSection):
    """A figure found by `json`, `regex` or `until`; without these, one that is known by name."""

    json_: str | None = Field(default=None, alias="json")
    """Dotted path in the last JSON value the command prints, such as throughput.mfu."""
    per: str | None = None
    """Dotted path, beside `json`, of a number to divide by."""
    regex: str | None = None
    """Regular expression with one group around the number; each match in the output counts."""
    until: str | None = None
    """Regular expression: seconds from the command's start to the first line that matches."""
    file: str | None = None
    """File to look in instead of the output; with `json`, each line of a .jsonl counts."""
    reduce: Literal["median", "mean", "min", "max", "last", "sum"] = "median"
    """What several values in one run become for the statistics over rounds."""
    scale: float = 1.0
    """Factor on the number found: 0.001 for milliseconds that should be seconds."""
    unit: str | None = None
    """Unit shown beside the figures."""
    better: Literal["higher", "lower"] | None = None
    """Which way is better; without it a change is told and not judged."""

    @property
    def is_described(self) -> bool:
        """Whether it says itself how the figure is found."""
        return any((self.json_, self.regex, self.until))

    @model_validator(mode="after")
    def _check(self) -> "Metric":
        ways = [self.json_, self.regex, self.until]
        if sum(way is not None for way in ways) > 1:
            raise ValueError("give only one of json, regex, until")
        if self.per is not None and self.json_ is None:
            raise ValueError("per goes with json")
        for name in ("regex", "until"):
            pattern = getattr(self, name)
            try:
                groups = re.compile(pattern or "()").groups
            except re.error as error:
                raise ValueError(f"{name} is no regular expression: {error}") from None
            if name == "regex" and groups != 1:
                raise ValueError("regex needs one group ( ) around the number")
        return self


class Variant(DocumentSection):
    """One contender; what it does not give is the benchmark's."""

    command: str | None = None
    """What to run instead of the benchmark's command."""
    values: dict[str, Text] = Field(default_factory=dict)
    """Texts for the placeholders of the command, by name."""
    environment: dict[str, Text] = Field(default_factory=dict)
    """Environment variables to set."""
    metrics: dict[str, Metric | None] = Field(default_factory=dict)
    """Metrics that are found in another way than the benchmark's, by name."""


class Benchmark(DocumentSection):
    """Commands that are run in turns, and what is read from each run."""

    description: str = ""
    """A line for the report."""
    setup: list[str] = Field(default_factory=list)
    """Commands to run once before the first round, not measured."""
    command: str | None = None
    """What to run, as on a command line without a shell; {name} stands for a value."""
    values: dict[str, Text] = Field(default_factory=dict)
    """Texts for placeholders, by name; a variant's come first."""
    environment: dict[str, Text] = Field(default_factory=dict)
    """Environment variables to set for all variants."""
    warmup_steps: int = Field(default=0, ge=0)
    """First steps of each run left out: of training's speeds, and of metrics with several values
    in a run."""
    warmup_rounds: int = Field(default=1, ge=0)
    """Rounds that are run first and not counted."""
    rounds: int = Field(default=5, ge=1)
    """Rounds that are counted; each runs every variant once."""
    timeout_seconds: float = Field(default=3600, gt=0)
    """Longest a run may take."""
    metrics: Annotated[dict[str, Metric | None], BeforeValidator(_as_mapping), Field(min_length=1)]
    """Figures by name: known names need nothing further, others a description."""
    variants: dict[Name, Variant | None] = Field(default={"default": None}, min_length=1)
    """Contenders by name."""
    baseline: str | None = None
    """Variant the others are set in relation to; the first when not given."""


class SpecFile(DocumentSection):
    """The whole file."""

    benchmarks: dict[Name, Benchmark] = Field(min_length=1)
    """Benchmarks by name."""
