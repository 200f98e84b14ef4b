"""Another system's configuration in our keys, with what became of each of theirs.

`api.import_config` calls `translate`. It must never know any one system.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from penstock.config.load import as_config
from penstock.console import Console
from penstock.errors import ConfigError
from penstock.files import atomic_write
from penstock.migrate.reading import read_their_config
from penstock.migrate.rules import System
from penstock.migrate.systems import SYSTEMS


@dataclasses.dataclass(frozen=True)
class Line:
    """What became of one of their keys."""

    theirs: str
    value: Any
    kind: str
    """maps, changed, none or unknown."""
    ours: dict[str, Any]
    note: str
    is_default: bool = False
    """Whether it was not in the file: what their program does without it."""


@dataclasses.dataclass(frozen=True)
class ImportedConfig:
    """A translated configuration."""

    source: Path
    system: System
    lines: list[Line]
    values: dict[str, Any]
    """Ours, by dotted key; they load."""
    written: Path | None

    def json(self) -> dict[str, Any]:
        """The config, and every key of theirs."""
        keys = [dataclasses.asdict(line) for line in self.lines]
        return {"from": self.system.name, "config": nested(self.values), "keys": keys}

    def show(self, console: Console) -> None:
        """A table of the keys, a line for each unknown one, and the YAML."""
        words = {"maps": "=", "changed": "≈", "none": "–"}
        console.info(f"{self.system.title}: = maps, ≈ changed in meaning, – no counterpart")
        width = max(len(_named(line)) for line in self.lines)
        for line in sorted(
            self.lines,
            key=lambda line: list(words).index(line.kind) if line.kind in words else len(words),
        ):
            if line.kind in words:
                parts = filter(None, (_shown(line.ours), line.note))
                console.info(f"  {_named(line):{width}} {words[line.kind]} {': '.join(parts)}")
        for line in self.lines:
            if line.kind == "unknown":
                console.warning(f"{line.theirs}: {line.note}")
        if self.written is not None:
            console.path("config", self.written)
        else:
            console.write(self.text(), end="")

    def text(self) -> str:
        """Our YAML."""
        heading = f"# From {self.source.name} of {self.system.title}.\n"
        return heading + yaml.safe_dump(nested(self.values), sort_keys=False, allow_unicode=True)


def translate(source: Path, name: str, out: Path | None) -> ImportedConfig:
    """Translate a file of the system `name`; write our YAML to `out` where that is given.

    Raises:
        ConfigError: no such system, an unreadable file, one of another system, or values that
            ours cannot take; the key is named.
    """
    if name not in SYSTEMS:
        near = difflib.get_close_matches(name, SYSTEMS, 1)
        raise ConfigError(
            f"there is no system {name}",
            where="--from",
            do=f"did you mean {near[0]}?" if near else f"use one of {', '.join(SYSTEMS)}",
        )
    system = SYSTEMS[name]
    given = read_their_config(source)
    if not any(system.rule(key) for key in given):
        raise ConfigError(
            f"{source} has no key of {system.title}",
            where="--from",
            do=f"check the file, or use another of {', '.join(SYSTEMS)}",
        )
    lines, values = _apply(system, given)
    as_config(values)  # what we write must load
    result = ImportedConfig(source, system, lines, values, out)
    if out is not None:
        atomic_write(out, result.text())
    return result


def _apply(system: System, given: Mapping[str, Any]) -> tuple[list[Line], dict[str, Any]]:
    """Their keys in the file's order, then their defaults; ours in the rules' order."""
    theirs = {**system.defaults, **given}
    lines: list[Line] = []
    for key in [*given, *(key for key in system.defaults if key not in given)]:
        rule = system.rule(key)
        if rule is None:
            names = [one.theirs for one in system.rules]
            near = difflib.get_close_matches(key, names, 1, 0.75)
            known = f"did they mean {near[0]}?" if near else "left out"
            note = f"not a key of {system.title} that is known here: {known}"
            lines.append(Line(key, theirs[key], "unknown", {}, note))
            continue
        try:
            ours = dict(rule.apply(theirs[key], theirs))
        except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError):
            raise ConfigError(
                f"{key}={theirs[key]} cannot be translated",
                where=key,
                do="correct the value, or leave it out",
            ) from None
        lines.append(Line(key, theirs[key], rule.kind, ours, rule.note, key not in given))
    order = {rule.theirs: place for place, rule in enumerate(system.rules)}
    values = dict(system.implied)
    for line in sorted(lines, key=lambda line: (not line.is_default, order.get(line.theirs, 0))):
        values |= line.ours
    return lines, values


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    tree: dict[str, Any] = {}
    for key, value in sorted(values.items(), key=lambda item: "." in item[0]):
        *sections, leaf = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return tree


def _named(line: Line) -> str:
    """Their key, and whether it is their default."""
    return f"{line.theirs}{' (default)' if line.is_default else ''}"


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
