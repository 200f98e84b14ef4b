"""A YAML file as one nested value that remembers the line of each of its keys.

Files that are not a `Config` (benchmark specifications) are read and checked here, with the same
scalars and the same kind of messages. It must never know what a value means.
"""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from penstock.config.parse import YamlLoader
from penstock.config.section import Section
from penstock.errors import ConfigError

_MOST_KEYS = 100_000
"""Keys a document may have: repeated aliases can make few lines stand for billions."""
_SHOWN_CHARACTERS = 60
"""Longest wrong value shown in full."""
Place = tuple[str, ...]
"""Keys from the root down."""
_Model = TypeVar("_Model", bound=BaseModel)


class _MergingLoader(YamlLoader):
    """The same, with `<<: *anchor` (https://yaml.org/type/merge.html): specifications repeat."""


_MergingLoader.yaml_implicit_resolvers = dict(YamlLoader.yaml_implicit_resolvers)
_MergingLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])


class DocumentSection(Section):
    """A section of a document: an unknown key is an error that names the nearest one."""

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, values: Any) -> Any:  # noqa: ANN401 - whatever the file holds
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                raise PydanticCustomError(
                    "unknown_key", "{do}", {"key": str(key), "do": nearest(str(key), known)}
                )
        return values


@dataclasses.dataclass(frozen=True)
class Document:
    """What a YAML file says, and where it says it."""

    path: Path
    value: Any
    lines: dict[Place, int]
    """Line of each key, from 1."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML file.

        Raises:
            ConfigError: unreadable, not YAML, not a mapping, or a key given twice.
        """
        try:
            loader = _MergingLoader(path.read_text(encoding="utf-8"))
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(f"{path} is not a mapping of keys")
            lines: dict[Place, int] = {}
            _note_lines(root, (), path, lines)
            return cls(path, loader.construct_document(root), lines)  # type: ignore[no-untyped-call]
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist", do="check the path") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except RecursionError:
            raise ConfigError(f"{path} is nested too deeply") from None
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is not YAML: {error}") from None

    def where(self, *place: str) -> str:
        """FILE:LINE of a place, or of the nearest place above it that the file has."""
        for length in range(len(place), 0, -1):
            if place[:length] in self.lines:
                return f"{self.path}:{self.lines[place[:length]]}"
        return str(self.path)

    def check(self, model: type[_Model]) -> _Model:
        """The document as `model`.

        Raises:
            ConfigError: unknown key (the nearest is named), or wrong value.
        """
        try:
            return model.model_validate(self.value)
        except ValidationError as error:
            first = error.errors()[0]
            # What pydantic adds for unions and for keys of mappings is no place of the file.
            place = tuple(str(part) for part in first["loc"])
            place = max((p for p in self.lines if p == place[: len(p)]), key=len, default=())
            if first["type"] == "unknown_key":
                key = first["ctx"]["key"] if "ctx" in first else ""
                what = f"there is no key {'.'.join((*place, key))}"
                raise ConfigError(what, where=self.where(*place, key), do=first["msg"]) from None
            message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
            name = ".".join(place) or str(self.path)
            what = f"{name} is wrong: {message}"
            if first["type"] == "missing":
                what = f"{'.'.join((*place, str(first['loc'][-1])))} is missing"
            elif not isinstance(first["input"], dict | list):
                what = f"{name}={_shown(first['input'])} is wrong: {message}"
            raise ConfigError(what, where=self.where(*place)) from None


def nearest(word: str, known: list[str]) -> str:
    """Advice about a word that is not known: the nearest one, or all there are."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"


def _note_lines(node: yaml.Node, place: Place, path: Path, lines: dict[Place, int]) -> None:
    """Collect the line of every key below a node; list items stand under their index."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*place, str(index))] = item.start_mark.line + 1
            _note_lines(item, (*place, str(index)), path, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        where = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError("a key must be a word", where=where)
        inner = (*place, key.value)
        if inner in lines:
            raise ConfigError(f"{'.'.join(inner)} is given twice", where=where, do="keep one")
        lines[inner] = key.start_mark.line + 1
        if len(lines) > _MOST_KEYS:
            raise ConfigError(f"{path} has more than {_MOST_KEYS:,} keys")
        _note_lines(value, inner, path, lines)


def _shown(value: object) -> str:
    """A wrong value as the user would write it, short enough for one line."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
