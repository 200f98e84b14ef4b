"""Text to values: YAML files, and the right-hand sides of `key.sub=value`.

`config/load.py` uses it. It must never know what a value means, only what type its key takes.

Scalars follow the YAML 1.2 core schema (https://yaml.org/spec/1.2.2, §10.3.2), not PyYAML's 1.1:
`off` is a word, `010` is ten, `1:30` and `2024-01-01` are texts, `6e-4` is a number.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from penstock.config.keys import is_section, kinds, takes_list_of_text
from penstock.errors import ConfigError

_NULL_TAG = "tag:yaml.org,2002:null"


class Entry(NamedTuple):
    """One value of a file."""

    key: str
    """Dotted."""
    value: Any
    where: str
    """FILE:LINE."""


class YamlLoader(yaml.SafeLoader):
    """YAML 1.2 scalars; nothing but plain data can be made."""


YamlLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
):
    YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def read_file(path: Path) -> list[Entry]:
    """Every value of a YAML file, in its order; keys may be nested or dotted.

    Raises:
        ConfigError: unreadable, not YAML, not a mapping, or a key given twice.
    """
    try:
        loader = YamlLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None or root.tag == _NULL_TAG:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path} is not a mapping of keys", where="--config")
        return _without_repeats(_entries(loader, root, "", path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", where="--config", do="check the path") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", where="--config") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply", where="--config") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", where="--config") from None


def parse_word(text: str, key: str) -> Any:  # noqa: ANN401 - any config value
    """A command-line value by the type of its key.

    Keys that take text get it as it stands, also where it looks like something else; `null` is
    None; [lists], true, false and numbers are as in YAML. What is neither is left as text, for
    the schema to refuse.
    """
    if text in ("null", "~"):
        return None
    taken = kinds(key)
    is_list = list in taken and text.lstrip().startswith("[")
    if str in taken and not is_list:
        return text
    try:
        loader = YamlLoader(text)
        node = loader.get_single_node()
        value = None if node is None else _value(loader, node, key)
    except (ValueError, RecursionError, yaml.YAMLError):
        return text
    return value if isinstance(value, bool | int | float | list) else text


def _entries(
    loader: YamlLoader, mapping: yaml.MappingNode, prefix: str, path: Path
) -> Iterator[Entry]:
    for name, node in mapping.value:
        where = f"{path}:{name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode):
            raise ConfigError("a key must be a word", where=where)
        key = f"{prefix}{name.value}"
        if isinstance(node, yaml.MappingNode) and node.value:
            yield from _entries(loader, node, f"{key}.", path)
            continue
        value = _value(loader, node, key)
        # An empty section is what is left when all its lines are commented out.
        if not (is_section(key) and value in (None, {})):
            yield Entry(key, value, where)


def _without_repeats(entries: Iterator[Entry]) -> list[Entry]:
    seen: dict[str, Entry] = {}
    for entry in entries:
        if entry.key in seen:
            raise ConfigError(
                f"{entry.key} is given twice",
                where=f"{seen[entry.key].where} and {entry.where}",
                do="keep one",
            )
        seen[entry.key] = entry
    return list(seen.values())


def _value(loader: YamlLoader, node: yaml.Node, key: str) -> Any:  # noqa: ANN401 - any config value
    """A node as its key takes it: texts stay as they are written."""
    if takes_list_of_text(key) and isinstance(node, yaml.SequenceNode):
        return [_text(loader, item) for item in node.value]
    if str in kinds(key):
        return _text(loader, node)
    return loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]


def _text(loader: YamlLoader, node: yaml.Node) -> Any:  # noqa: ANN401 - text, or what is not one
    if isinstance(node, yaml.ScalarNode) and node.tag != _NULL_TAG:
        return node.value
    return loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
