"""How documents become sequences: `full`, `greedy` or `single`.

`data/prepare.py` applies it while it writes. It must never know about files. The names and rules
are those of SambaNova's generative_data_prep (`input_packing_config`).
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def fit(document: NDArray[Any], overflow: str, limit: int) -> NDArray[Any] | None:
    """The document itself, or cut to `limit` tokens, or None when it is longer and dropped."""
    if len(document) <= limit:
        return document
    if overflow == "drop":
        return None
    return document[-limit:] if overflow == "truncate_left" else document[:limit]


def pack_rows(documents: Iterable[NDArray[Any]], kind: str, limit: int) -> Iterator[NDArray[Any]]:
    """Yield rows of at most `limit` tokens, the sequence length and one (inputs, shifted targets).

    greedy puts whole documents into a row while they fit; single gives each its own row. No
    document may be longer than `limit` (see `fit`). Rows are not padded; the reader pads them.
    """
    row: list[NDArray[Any]] = []
    used = 0
    for document in documents:
        if row and (kind == "single" or used + len(document) > limit):
            yield np.concatenate(row)
            row, used = [], 0
        row.append(document)
        used += len(document)
    if row:
        yield np.concatenate(row)
