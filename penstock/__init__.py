"""Penstock: raw text to a trained, evaluated, generating language model, through one compiled file.

The verbs are functions here: `penstock.prepare(...)`, `penstock.train(...)` and so on; each takes
a config as keyword sections, a mapping, a YAML file or a `Config`. One verb is not here: `report`
is `penstock.api.report`, because `penstock.report` is the package that draws it.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_VERBS = (
    "prepare",
    "plan",
    "compile",
    "train",
    "evaluate",
    "generate",
    "convert",
    "import_config",
    "inspect",
    "doctor",
)

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - functions and classes
    """Load a verb, Config or UserError on first use, so that `import penstock` costs nothing."""
    if name in _VERBS:
        return getattr(importlib.import_module("penstock.api"), name)
    if name == "Config":
        return importlib.import_module("penstock.config.schema").Config
    if name == "UserError":
        return importlib.import_module("penstock.errors").UserError
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
