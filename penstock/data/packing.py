"""How documents become sequences: `full`, `greedy` or `single`.

`data/articles.py` packs so. It must never know about files. The names and rules
are those of SambaNova's generative_data_prep (`input_packing_config`).
"""

import dataclasses

from penstock.errors import ConfigError

_KINDS = ("full", "greedy", "single")
_OVERFLOWS = ("drop", "truncate_left", "truncate_right")


@dataclasses.dataclass(frozen=True)
class Packing:
    """A parsed `data.packing`."""

    kind: str
    """full, greedy or single."""
    overflow: str
    """What happens to a document longer than a row: drop, truncate_left, truncate_right."""


def parse_packing(text: str) -> Packing:
    """Read "full", "greedy::drop", "single::truncate_right" and so on.

    Raises:
        ConfigError: anything else.
    """
    kind, _, overflow = text.partition("::")
    if kind == "full" and not overflow:
        return Packing("full", "drop")
    if kind not in _KINDS or overflow not in _OVERFLOWS:
        raise ConfigError(
            f"data.packing={text} is not a packing",
            where="data.packing",
            do=f"use full, or greedy:: or single:: with {', '.join(_OVERFLOWS)}",
        )
    return Packing(kind, overflow)
