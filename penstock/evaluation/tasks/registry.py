"""The tasks there are, by name.

`evaluate_run.py` makes them before a model is loaded, so that missing data is told at once.
"""

import difflib
from collections.abc import Callable

from penstock.config.schema import EvaluateSection
from penstock.errors import ConfigError
from penstock.evaluation.tasks.harness import Harness
from penstock.evaluation.tasks.lambada import Lambada
from penstock.evaluation.tasks.sst2 import Sst2
from penstock.evaluation.tasks.task import Task
from penstock.evaluation.tasks.wikitext import WikiText

PERPLEXITY = "perplexity"
"""The dataset's own split, see `evaluation/perplexity.py`: a task without data of its own."""
TASKS: dict[str, Callable[[EvaluateSection], Task]] = {
    WikiText.name: WikiText,
    Lambada.name: Lambada,
    Sst2.name: Sst2,
}
_HARNESS = "harness:"


def make_tasks(section: EvaluateSection) -> list[Task]:
    """The tasks of `evaluate.tasks`, each with its data read, but for perplexity.

    Raises:
        ConfigError: a task that does not exist.
        DataError: a task without data.
    """
    return [_make(name, section) for name in dict.fromkeys(section.tasks) if name != PERPLEXITY]


def _make(name: str, section: EvaluateSection) -> Task:
    if name.startswith(_HARNESS):
        return Harness(section, name.removeprefix(_HARNESS))
    if name in TASKS:
        return TASKS[name](section)
    known = [PERPLEXITY, *TASKS, f"{_HARNESS}NAME"]
    near = difflib.get_close_matches(name, known, 1)
    raise ConfigError(
        f"there is no task {name}",
        where="evaluate.tasks",
        do=f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}",
    )
