"""From YAML and `key.sub=value` overrides to a checked `Config`, and back.

`cli.py` and `api.py` use it. It must never know what keys do.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from penstock.config.keys import all_keys, in_section, kinds, require_key
from penstock.config.parse import parse_word, read_file
from penstock.config.schema import Config
from penstock.errors import ConfigError

_SHOWN_CHARACTERS = 60
"""Longest wrong value shown in full."""


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """A config and where each of its values came from."""

    config: Config
    origins: Mapping[str, str]
    """Dotted key → "command line" or FILE:LINE; keys left at their default are absent."""


def load_config(
    file: str | Path | None, overrides: Sequence[str] = (), section: str | None = None
) -> LoadedConfig:
    """Read a YAML file, apply `key.sub=value` overrides, and check everything.

    Overrides may leave `section` out: `steps=100` is train.steps for the verb train.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest is named), or wrong value.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if file is not None:
        for entry in read_file(Path(file)):
            _set(values, entry.key, entry.value, entry.where)
            origins[entry.key] = entry.where
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise ConfigError(
                f"{override} is not key=value", where="command line", do="write model.layers=6"
            )
        key = in_section(key, section)
        _set(values, key, parse_word(text, key), "command line")
        origins[key] = "command line"
    return LoadedConfig(_validate(values, origins), origins)


def as_config(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    **overrides: Any,  # noqa: ANN401 - any config value
) -> Config:
    """What the Python API accepts as a config: a `Config`, a mapping, a YAML file, or nothing.

    Mappings may be nested or have dotted keys; `overrides` are sections (mappings, or the schema's
    own) or root keys. Paths may be `Path` objects.

    Raises:
        ConfigError: as `load_config`.
    """
    if isinstance(config, Config) and not overrides:
        return config
    origins: dict[str, str] = {}
    base: dict[str, Any]
    if isinstance(config, str | Path):
        entries = read_file(Path(config))
        base = {entry.key: entry.value for entry in entries}
        origins = {entry.key: entry.where for entry in entries}
    elif isinstance(config, Config):
        base = dict(flatten(config.model_dump(by_alias=True, exclude_unset=True)))
    elif isinstance(config, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are not type-checked
        base = dict(flatten(config or {}))
    else:
        raise ConfigError(
            f"{_shown(config)} is no config", do="give a Config, a mapping, or a YAML file's path"
        )
    given = dict(flatten({name: _as_mapping(value) for name, value in overrides.items()}))
    values: dict[str, Any] = {}
    for key, value in (base | given).items():
        if key in given:
            origins.pop(key, None)
        _set(values, key, value, origins.get(key, "config"))
    return _validate(values, origins)


def dump_config(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """YAML of every value, each with its origin as a comment; loads back to an equal config."""
    lines: list[str] = []
    section = ""
    for key, value in flatten(config.model_dump(by_alias=True, mode="json")):
        head, _, leaf = key.rpartition(".")
        if head != section:
            section = head
            lines.append(f"{head}:")
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
        text = text.removesuffix("...").strip()
        origin = " ".join((origins or {}).get(key, "default").split())
        lines.append(f"{'  ' if head else ''}{leaf}: {text}  # {origin}")
    return "\n".join(lines) + "\n"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted key, value), root keys first."""
    nested: list[tuple[str, Mapping[str, Any]]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            nested.append((f"{prefix}{key}.", value))
        else:
            yield f"{prefix}{key}", value
    for inner, value in nested:
        yield from flatten(value, inner)


def _set(values: dict[str, Any], key: str, value: Any, where: str) -> None:  # noqa: ANN401 - any config value
    """Put a value at a dotted key that exists."""
    require_key(key, where)
    if isinstance(value, bool) and bool not in kinds(key):
        # Python counts True as 1; a user who writes steps=true did not mean one step.
        raise ConfigError(f"{key}={_shown(value)} is wrong: not true or false", where=where)
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = _path_as_text(value)


def _as_mapping(value: Any) -> Any:  # noqa: ANN401 - any config value
    """A section of the schema as what was set in it; everything else as it is."""
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_unset=True)
    return value


def _path_as_text(value: Any) -> Any:  # noqa: ANN401 - any config value
    """Paths, alone or in a list, as text; everything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_path_as_text(item) for item in value]
    return value


def _shown(value: Any) -> str:  # noqa: ANN401 - any config value
    """A wrong value as the user would write it, short enough for one line."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _validate(values: dict[str, Any], origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"]]
        key = next(
            (k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in set(all_keys())),
            ".".join(parts),
        )
        given = _shown(first.get("input"))
        # Of a key that takes one of several kinds, each kind says what it misses.
        depth = key.count(".") + 1
        others = [e for e in error.errors() if list(e["loc"][:depth]) == list(first["loc"][:depth])]
        wrong = [e for e in others if e["type"] != "missing"] or [first]
        said = dict.fromkeys(
            e["msg"].removeprefix("Input ").removeprefix("Value error, ") for e in wrong
        )
        message = ", or ".join(said)
        raise ConfigError(
            f"{key}={given} is wrong: {message}",
            where=origins.get(key, key),
            do=f"see {key} in `penstock VERB --help`",
        ) from None
