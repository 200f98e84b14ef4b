"""What a translation consists of: rules key by key, and the systems that have them.

The modules beside it hold one system's rules each; `translate.py` applies them and `pages.py`
writes them down. It must never know any one system.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Values = Mapping[str, Any]
"""Dotted key → value."""
Convert = Callable[[Any, Values], Values]
"""From a value of theirs, and all of theirs, to values of ours."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of one of their keys."""

    theirs: str
    """Dotted, hyphens as underscores; a last part of `*` stands for all keys of a section."""
    ours: str
    """Our keys, for people; empty where there is no counterpart."""
    note: str
    """What changed in meaning, or why there is no counterpart; empty where it means the same."""
    convert: Convert | None
    """None: the value goes to `ours` as it is; without `ours`, nowhere."""

    @property
    def kind(self) -> str:
        """maps, changed or none."""
        if not self.ours:
            return "none"
        return "changed" if self.note else "maps"

    def apply(self, value: Any, theirs: Values) -> Values:  # noqa: ANN401 - any value of a file
        """Values of ours."""
        if self.convert is not None:
            return {k: v for k, v in self.convert(value, theirs).items() if v is not None}
        return {self.ours: value} if self.ours else {}


def maps(theirs: str, ours: str, convert: Convert | None = None) -> Rule:
    """A key that means the same here."""
    return Rule(theirs, ours, "", convert)


def changed(theirs: str, ours: str, note: str, convert: Convert | None = None) -> Rule:
    """A key whose counterpart means something a little different."""
    return Rule(theirs, ours, note, convert)


def none(theirs: str, reason: str) -> Rule:
    """A key without counterpart."""
    return Rule(theirs, "", reason, None)


def none_of(names: str, reason: str) -> tuple[Rule, ...]:
    """Several keys without counterpart for the same reason."""
    return tuple(none(name, reason) for name in names.split())


def if_true(ours: str, value: Any) -> Convert:  # noqa: ANN401 - any value of ours
    """A switch: our key gets a value when theirs is on."""
    return lambda given, _: {ours: value} if given else {}


def choice(ours: str, **named: Any) -> Convert:  # noqa: ANN401 - values of ours
    """A word of theirs as one of ours; other words go over as they are, for the schema to judge."""
    return lambda given, _: {ours: named.get(str(given).lower(), given)}


@dataclasses.dataclass(frozen=True)
class System:
    """A system whose configurations can be read."""

    name: str
    title: str
    source: str
    """Where its keys are defined."""
    rules: tuple[Rule, ...]
    command: str
    """A command or file of theirs, as its users know it."""
    ours: str
    """The same here."""
    defaults: Values = dataclasses.field(default_factory=dict[str, Any])
    """Their values for keys that are not given, where ours would differ."""
    implied: Values = dataclasses.field(default_factory=dict[str, Any])
    """Our values for what their program always does."""
    notes: tuple[str, ...] = ()
    """What a user should know besides."""

    def rule(self, key: str) -> Rule | None:
        """The rule for one of their keys."""
        found = {rule.theirs: rule for rule in self.rules}
        section = key.rpartition(".")[0]
        while key not in found and section:
            key, section = f"{section}.*", section.rpartition(".")[0]
        return found.get(key)
