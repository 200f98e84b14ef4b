"""From YAML and `key.sub=value` overrides to a checked `Config`, and back.

`cli.py` and `api.py` use it. It must never know what keys do.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from penstock.config.schema import Config
from penstock.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without silent duplicates, where only true and false are booleans, as in YAML 1.2:
    `compile.mode: off` means the word.
    """


_UniqueKeyLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key} is given twice", where=str(node.start_mark).strip())
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """A config and where each of its values came from."""

    config: Config
    origins: Mapping[str, str]
    """Dotted key → "command line" or a file's name; keys left at their default are absent."""


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML file, apply `key.sub=value` overrides, and check everything.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest is named), or wrong value.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if file is not None:
        for key, value in flatten(_read_yaml(Path(file))):
            _set(values, key, value, str(file))
            origins[key] = str(file)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise ConfigError(
                f"{override} is not key=value", where="command line", do="write model.layers=6"
            )
        _set(values, key, _parse(text, key), "command line")
        origins[key] = "command line"
    return LoadedConfig(_validate(values, origins), origins)


def as_config(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    **overrides: Any,  # noqa: ANN401 - any config value
) -> Config:
    """What the Python API accepts as a config: a `Config`, a mapping, a YAML file, or nothing.

    Mappings may be nested or have dotted keys; `overrides` are sections or root keys.
    """
    if isinstance(config, str | Path):
        base: dict[str, Any] = dict(flatten(_read_yaml(Path(config))))
    elif isinstance(config, Config):
        if not overrides:
            return config
        base = dict(flatten(config.model_dump(by_alias=True, exclude_unset=True)))
    else:
        base = dict(flatten(config or {}))
    base |= dict(flatten(overrides))
    values: dict[str, Any] = {}
    for key, value in base.items():
        _set(values, key, value, "config")
    return _validate(values, {})


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
        origin = (origins or {}).get(key, "default")
        lines.append(f"{'  ' if head else ''}{leaf}: {text}  # {origin}")
    return "\n".join(lines) + "\n"


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key a user can set."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from all_keys(kind, f"{key}.")
        else:
            yield key


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", where="--config", do="check the path") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", where="--config") from None
    if not isinstance(value, dict | None):
        raise ConfigError(f"{path} is not a mapping of keys", where="--config")
    return value or {}


def _parse(text: str, key: str) -> Any:  # noqa: ANN401 - any config value
    """A command-line value: null, true, numbers and [lists] as in YAML, everything else as text.

    A key that takes text gets it as it stands, also where it looks like a number.
    """
    try:
        value = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ConfigError):
        return text
    if value is None:
        return None if text in ("null", "~") else text
    takes_text = str in typing.get_args(_annotation(key))
    if isinstance(value, list) or (isinstance(value, bool | int | float) and not takes_text):
        return value
    return text


def _annotation(key: str) -> Any:  # noqa: ANN401 - a type
    """The type of a dotted key; None for an unknown one."""
    model: Any = Config
    for part in key.split("."):
        fields = getattr(model, "model_fields", {})
        named = {field.alias or name: field.annotation for name, field in fields.items()}
        model = named.get(part)
    return model


def _set(values: dict[str, Any], key: str, value: Any, where: str) -> None:  # noqa: ANN401 - any config value
    """Put a value at a dotted key that exists."""
    known = list(all_keys())
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.5)
        leaf = key.rpartition(".")[2]
        near = near or [name for name in known if name.rpartition(".")[2] == leaf]
        do = f"did you mean {near[0]}?" if near else "see `penstock VERB --help`"
        raise ConfigError(f"there is no key {key}", where=where, do=do)
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value


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
        given = first.get("input")
        message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        raise ConfigError(
            f"{key}={given} is wrong: {message}",
            where=origins.get(key, key),
            do=f"see {key} in `penstock VERB --help`",
        ) from None
