"""Other systems' files as dotted keys and values: YAML, JSON, command lines.

`translate.py` calls `read_their_config`. It must never know what a key means.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from penstock.errors import ConfigError

_LARGEST_BYTES = 1 << 20
_VARIABLE = re.compile(r"^[A-Z_][A-Z0-9_]*=")
_OVERRIDE = re.compile(r"^\+{0,2}([A-Za-z_][\w.-]*)=(.*)$", re.S)
"""Hydra's key=value, +key=value."""
_NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def read_their_config(path: Path) -> dict[str, Any]:
    """Every value of a YAML or JSON file, or of the command lines of any other, by dotted key
    with hyphens as underscores.

    Raises:
        ConfigError: unreadable, damaged, or without a single value.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ConfigError(f"{path} is too large for a configuration", where="import-config")
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or "it is not UTF-8 text"
        raise ConfigError(
            f"{path} cannot be read: {why}", where="import-config", do="check the path"
        ) from None
    try:
        if path.suffix == ".json":
            values = _flat(json.loads(text))
        elif path.suffix in (".yaml", ".yml"):
            values = _flat(yaml.safe_load(text))
        else:
            values = _command_line(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}", where="import-config") from None
    if not values:
        raise ConfigError(
            f"{path} holds no settings",
            where="import-config",
            do="give a YAML or JSON file, or a text file with the command line",
        )
    return values


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:  # noqa: ANN401 - any document
    """Nested mappings as dotted keys."""
    if not isinstance(tree, dict):
        raise ValueError("it is not a mapping of keys")
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{str(name).replace('-', '_')}"
        if isinstance(value, dict) and value:
            values |= _flat(value, f"{key}.")
        else:
            values[key] = scalar(value)
    return values


def _command_line(text: str) -> dict[str, Any]:
    """`--key value…`, `--key=value`, `--switch`, and Hydra's `key=value`; what stands before the
    first of them is the program.
    """
    values: dict[str, Any] = {}
    key: str | None = None
    for word in shlex.split(text.replace("\\\n", " "), comments=True):
        override = _OVERRIDE.match(word)
        if word.startswith("--") and len(word) > 2:
            name, sign, value = word[2:].partition("=")
            key = name.replace("-", "_")
            values[key] = scalar(value) if sign else True
        elif override is not None and _is_override(word, key is not None and values[key] is True):
            values[override[1].replace("-", "_")] = scalar(override[2])
            key = None
        elif key is not None:
            before = values[key]
            if before is True:
                values[key] = scalar(word)
            else:
                values[key] = [*(before if isinstance(before, list) else [before]), scalar(word)]
    return values


def _is_override(word: str, is_awaited: bool) -> bool:
    """Whether key=value stands for itself: no variable of the shell, nor a switch's own value."""
    return word.startswith("+") or not (is_awaited or _VARIABLE.match(word))


def scalar(value: Any) -> Any:  # noqa: ANN401 - any value of a file
    """Text as the number or truth it spells; YAML 1.1 leaves 1e-5 a text."""
    if isinstance(value, list):
        return [scalar(item) for item in value]
    if not isinstance(value, str):
        return value
    word = value.strip()
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if not _NUMBER.match(word):
        return value
    return int(word) if re.fullmatch(r"[-+]?\d+", word) else float(word)
