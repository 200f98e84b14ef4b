"""Named stretches of time, for whoever is recording; nothing at all otherwise.

Hot paths mark themselves with `span`; `profiling/` records. It must never import torch: the
recorder is handed in.
"""

import contextlib
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager

_NOTHING = contextlib.nullcontext()
_recorders: list[Callable[[str], AbstractContextManager[object]]] = []


def span(name: str) -> AbstractContextManager[object]:
    """A stretch called `name`, such as kernel/block_forward: a list is looked at when nobody
    records.
    """
    return _recorders[-1](name) if _recorders else _NOTHING


@contextlib.contextmanager
def recording(recorder: Callable[[str], AbstractContextManager[object]]) -> Generator[None]:
    """Hand every span to `recorder` meanwhile."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()
