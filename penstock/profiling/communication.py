"""What processes said to each other in a recording: each exchange, who came late, what links bore.

`profiling/processes.py` sets the recordings of several processes side by side with it. Times are
microseconds of the trace. It must never import torch.
"""

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from penstock.profiling.intervals import Interval

_ASKED = re.compile(r"collective/(\w+) (\d+) bytes (?:among ([\d,]+)|from (\d+) to (\d+))")
"""The marks of `profiling/marks.py`."""
_ENDS = ("send", "recv")
_DONE_AS = {
    # Gloo sums the whole and gives each its rows.
    "reduce_scatter": ("reduce_scatter", "all_reduce"),
    # NCCL has one kernel for what is sent and received.
    "send": ("send", "send_recv"),
    "recv": ("recv", "send_recv"),
}
"""Kind of an exchange → what does it may be called so."""
_NCCL = re.compile(r"nccl\w*Kernel_?(AllReduce|AllGather|ReduceScatter|SendRecv|Broadcast)")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective, or one end of a message, as one process saw it."""

    kind: str
    """all_reduce, reduce_scatter, all_gather, broadcast, barrier, send or recv."""
    bytes: int
    """Of the whole: what is summed, sent, scattered or gathered."""
    ranks: tuple[int, ...]
    """All that take part; of a message its sender and its receiver."""
    begun: float
    """When this process was there."""
    ended: float
    """`begun` where nothing was seen of its course."""

    @property
    def link_bytes(self) -> float:
        """Least that a process's link must bear in one direction, all others' being alike.

        Source: nccl-tests, doc/PERFORMANCE.md, "bus bandwidth".
        """
        others = (len(self.ranks) - 1) / len(self.ranks)
        shares = {"all_reduce": 2 * others, "all_gather": others, "reduce_scatter": others}
        return self.bytes * shares.get(self.kind, 1.0)


def read_exchanges(events: Sequence[dict[str, Any]]) -> list[Exchange]:
    """Every exchange of a trace, in the order in which the process asked for them.

    Gloo's threads and NCCL's stream take them up in that order; of two groups with the same kind
    under way at once, which is which is not known.
    """
    # A GPU's tracks repeat the marks.
    marks = [e for e in events if e.get("cat") == "user_annotation"]
    asked = sorted(
        ((float(e["ts"]), match) for e in marks if (match := _ASKED.match(str(e["name"])))),
        key=lambda pair: pair[0],
    )
    courses = sorted(filter(None, map(_course, events)))
    found: list[Exchange] = []
    for start, match in asked:
        kind = match[1]
        names = _DONE_AS.get(kind, (kind,))
        own = next((c for c in courses if c[0] >= start and c[2] in names), None)
        if own is not None:
            courses.remove(own)
        begun, ended = (start, start) if own is None else own[:2]
        ranks = tuple(map(int, match[3].split(","))) if match[3] else (int(match[4]), int(match[5]))
        found.append(Exchange(kind, int(match[2]), ranks, begun, ended))
    return found


def _course(event: dict[str, Any]) -> tuple[float, float, str] | None:
    """Start, end and kind of an exchange under way, by gloo's threads or by NCCL's kernels."""
    name, category = str(event.get("name")), event.get("cat")
    if event.get("ph") != "X":
        return None
    if category == "kernel":
        match = _NCCL.search(name)
        kind = re.sub(r"(?<!^)(?=[A-Z])", "_", match[1]).lower() if match else None
    else:
        backend, _, kind = name.partition(":")
        kind = kind if backend == "gloo" else None
    start = float(event.get("ts", 0.0))
    return (start, start + float(event["dur"]), kind) if kind else None


def is_course(event: dict[str, Any]) -> bool:
    """Whether an event is the course of an exchange, which overlaps what its thread does."""
    return _course(event) is not None


def late_stretches(every: Sequence[Sequence[Exchange]]) -> list[list[Interval]]:
    """For each process's exchanges, by rank, the time in which another was not there yet."""
    found: list[list[Interval]] = [[] for _ in every]
    for there in _met(every):
        last = max(exchange.begun for exchange in there.values())
        for rank, own in there.items():
            if own.begun < min(last, own.ended):
                found[rank].append((own.begun, min(last, own.ended)))
    return found


def clock_shifts(every: Sequence[Sequence[Exchange]], hosts: Sequence[str]) -> list[float]:
    """Microseconds to add to each process's times, so that they are the first one's.

    Processes of a host have one clock. On others, what all sum ends everywhere at about the same
    moment: the median difference is the clocks'.
    """
    apart: list[list[float]] = [[] for _ in every]
    for there in _met(every):
        first = there.get(0)
        if first is None or first.kind not in ("all_reduce", "barrier"):
            continue
        for rank, own in there.items():
            apart[rank].append(first.ended - own.ended)
    return [
        statistics.median(differences) if differences and host != hosts[0] else 0.0
        for differences, host in zip(apart, hosts, strict=True)
    ]


def _met(every: Sequence[Sequence[Exchange]]) -> list[dict[int, Exchange]]:
    """Exchanges that are one and the same, by rank: the n-th of its kind among the same ranks."""
    found: dict[tuple[str, tuple[int, ...], int], dict[int, Exchange]] = {}
    for rank, exchanges in enumerate(every):
        seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for exchange in exchanges:
            kind = "message" if exchange.kind in _ENDS else exchange.kind
            seen[kind, exchange.ranks] += 1
            number = seen[kind, exchange.ranks]
            found.setdefault((kind, exchange.ranks, number), {})[rank] = exchange
    return [there for (_, ranks, _), there in found.items() if len(there) == len(ranks)]
