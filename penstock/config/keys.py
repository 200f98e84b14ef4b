"""The dotted keys a user can set, their types, and the nearest one to a misspelt one.

The rest of `config` asks here. It reads the schema's shape and must never know any value.
"""

import difflib
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from penstock.config.schema import Config
from penstock.errors import ConfigError


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key a user can set."""
    for key, annotation in _keys_and_types(model, prefix):
        if not _is_section(annotation):
            yield key


def is_section(key: str) -> bool:
    """Whether a key names a section, not a value."""
    return _is_section(_types().get(key))


def kinds(key: str) -> frozenset[type]:
    """Base types a key takes: str, int, float, bool, NoneType, list; empty for an unknown key."""
    return _kinds(_types().get(key))


def takes_list_of_text(key: str) -> bool:
    """Whether a list at this key holds texts."""
    annotation = _types().get(key)
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return any(typing.get_origin(o) is list and typing.get_args(o) == (str,) for o in options)


def in_section(key: str, section: str | None) -> str:
    """The key in full: one that exists only in `section` may be given without it."""
    full = f"{section}.{key}"
    return full if key not in _types() and full in _types() else key


def require_key(key: str, where: str) -> None:
    """Refuse a key that no value can have, naming the nearest that can.

    Raises:
        ConfigError: unknown key, or a section.
    """
    if key in _types() and not is_section(key):
        return
    known = list(all_keys())
    if is_section(key):
        near = next(name for name in known if name.startswith(f"{key}."))
        raise ConfigError(
            f"{key} is a section, not a value", where=where, do=f"set its keys, such as {near}"
        )
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, 1, 0.5)
    near = near or [name for name in known if name.rpartition(".")[2] == leaf]
    do = f"did you mean {near[0]}?" if near else "see `penstock VERB --help`"
    raise ConfigError(f"there is no key {key}", where=where, do=do)


@functools.cache
def _types() -> dict[str, Any]:
    """Every key, sections included, and its annotation."""
    return dict(_keys_and_types(Config, ""))


def _keys_and_types(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield key, field.annotation
        if _is_section(field.annotation):
            yield from _keys_and_types(typing.cast(type[BaseModel], field.annotation), f"{key}.")


def _is_section(annotation: Any) -> bool:  # noqa: ANN401 - any annotation
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_union(annotation: Any) -> bool:  # noqa: ANN401 - any annotation
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _kinds(annotation: Any) -> frozenset[type]:  # noqa: ANN401 - any annotation
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(annotation):
        return frozenset[type]().union(*map(_kinds, inner))
    if origin is typing.Annotated:
        return _kinds(inner[0])
    if origin is typing.Literal:
        return frozenset(map(type, inner))
    if origin in (list, tuple):
        return frozenset((list,))
    return frozenset((annotation,)) if isinstance(annotation, type) else frozenset()
