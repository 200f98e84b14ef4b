"""Names for stretches of a job that it does not name itself: modules' methods, what processes say
to each other.

`profiling/session.py` sets them while it records; `places.py` and `communication.py` read them.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch.distributed
from torch import Tensor, nn

from penstock.models.transformer import Transformer
from penstock.profiling.places import WAIT
from penstock.spans import span

_COLLECTIVES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "send": "send",
    "recv": "recv",
}
"""Methods of torch's process groups, through which all of torch.distributed goes, and what they do.
Torch's profiler names neither bytes nor group of gloo's, and no waiting."""


def mark_modules(model: Transformer, methods: Mapping[str, str]) -> None:
    """Name the stretches in which modules work: method → what its stretches are called."""
    parts: list[tuple[nn.Module, str]] = [(model.embed, "embedding"), (model.head, "head")]
    parts += [(block, "block") for block in model.blocks]
    for module, part in parts:
        for method, kind in methods.items():
            work = getattr(module, method, None)
            if work is not None:
                setattr(module, method, _named(work, f"region/{part} {kind}".strip()))


def mark_passes(decoder: Any, passes: list[tuple[int, int, int]]) -> None:  # noqa: ANN401 - any decoder
    """Note the shape of every pass: rows, new positions, cached positions."""
    extend, begin, start = decoder.extend, decoder.begin, 0

    def begin_again(*given: Any) -> Any:  # noqa: ANN401 - as the method
        nonlocal start
        start = 0
        return begin(*given)

    def extend_noting(tokens: Any) -> Any:  # noqa: ANN401 - as the method
        nonlocal start
        rows, count = tokens.shape
        passes.append((rows, count, start))
        start += count
        return extend(tokens)

    decoder.begin, decoder.extend = begin_again, extend_noting


@contextlib.contextmanager
def marked_collectives() -> Generator[None]:
    """Name every exchange with other processes, with its bytes and who takes part, and the time in
    which this one stands still for it.
    """
    group, work = torch.distributed.ProcessGroup, torch.distributed.Work
    makers = {name: functools.partial(_exchange, kind=kind) for name, kind in _COLLECTIVES.items()}
    chosen: list[tuple[type, str, Callable[..., Any]]] = [(work, "wait", _waiting)]
    chosen += [(group, name, maker) for name, maker in makers.items() if hasattr(group, name)]
    # As the class holds them: what getattr gives would not be bound when it is put back.
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in chosen]
    for owner, name, maker in chosen:
        setattr(owner, name, maker(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def _exchange(method: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The same, inside a span such as collective/all_reduce 4096 bytes among 0,1."""

    @functools.wraps(method)
    def named(group: Any, *given: Any, **more: Any) -> Any:  # noqa: ANN401 - as the method
        ranks = torch.distributed.get_process_group_ranks(group)
        if kind in ("send", "recv"):
            ends = (torch.distributed.get_rank(), ranks[given[1]])
            source, target = ends if kind == "send" else ends[::-1]
            who = f"from {source} to {target}"
        else:
            who = f"among {','.join(map(str, ranks))}"
        # What is gathered, or is to be scattered, is the larger of what is handed over.
        size = max((_bytes(value) for value in given), default=0)
        with span(f"collective/{kind} {size} bytes {who}"):
            return method(group, *given, **more)

    return named


def _waiting(wait: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(wait)
    def named(work: Any, *given: Any, **more: Any) -> Any:  # noqa: ANN401 - as the method
        with span(f"collective/{WAIT}"):
            return wait(work, *given, **more)

    return named


def _bytes(value: Any) -> int:  # noqa: ANN401 - what a collective takes
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _named(work: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same, inside a span; what many tokens go through at once is a prefill."""

    def named(*given: Any, **more: Any) -> Any:  # noqa: ANN401 - as the method
        is_prefill = name.endswith("decode") and given[0].shape[1] > 1
        with span(name.replace("decode", "prefill") if is_prefill else name):
            return work(*given, **more)

    return named
