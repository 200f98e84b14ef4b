"""The recordings of several processes side by side: who computed, who waited, what links bore.

The first process reads all of them (`profiling/session.py`); `profiling/report.py` shows them. It
must never import torch.
"""

import dataclasses
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.profiling.communication import (
    Exchange,
    clock_shifts,
    late_stretches,
    read_exchanges,
)
from penstock.profiling.device import WAITING
from penstock.profiling.intervals import Interval, common, length, without
from penstock.profiling.places import COMMUNICATION
from penstock.profiling.trace import Times, read_times
from penstock.profiling.work import Work


@dataclasses.dataclass(frozen=True)
class ProcessRecording:
    """What one process of several did."""

    rank: int
    host: str
    times: Times
    exchanges: list[Exchange]
    """Those of the recorded steps."""
    late: list[Interval]
    """In which it was in an exchange that another had not come to, microseconds of the trace."""
    work: Mapping[str, Work]
    peak_memory_bytes: int


@dataclasses.dataclass(frozen=True)
class ProcessRow:
    """One process in one step. Seconds of own work, communication, waiting for others and for data
    add up to the step.
    """

    rank: int
    host: str
    step_seconds: float
    work_seconds: float
    """All that is none of the following."""
    communication_seconds: float
    """In which it stood still, or copied, for communication that all had come to."""
    waiting_seconds: float
    """In which it stood still since another had not come yet."""
    data_seconds: float
    beside_seconds: float
    """Of communication, while this process did something else; in none of the others."""
    peak_memory_bytes: int


@dataclasses.dataclass(frozen=True)
class CollectiveRow:
    """One kind of exchange of one process, in one step."""

    rank: int
    kind: str
    calls: float
    bytes: float
    """Of the whole that is summed, sent, gathered or scattered."""
    seconds: float
    """Under way, here."""
    waiting_seconds: float
    """Of these, before the last process had come."""
    beside_seconds: float
    """Of these, while this process did something else."""
    gigabytes_per_second: float | None
    """Over this process's link, once all had come, in one direction."""
    link_share: float | None
    """Of the speed measured from one process to another; None where it was not measured."""


def trace_name(rank: int, size: int) -> str:
    """File of one process's own trace."""
    return f"trace-{rank + 1:05}-of-{size:05}.json.gz"


def read_processes(
    folder: Path, size: int, told: Mapping[str, Any]
) -> tuple[list[ProcessRecording], dict[str, Any]]:
    """All processes' recordings, in the first one's time, and their traces as one.

    `told`: of each rank, as text, peak_memory_bytes and the work of its regions (FLOPs, bytes).
    """
    traces = [
        json.loads(gzip.decompress((folder / trace_name(rank, size)).read_bytes()))
        for rank in range(size)
    ]
    hosts = [str(trace.get("host_name", "")) for trace in traces]
    apart = [float(trace.get("baseTimeNanoseconds", 0)) / 1e3 for trace in traces]
    for trace, base in zip(traces, apart, strict=True):
        _shift(trace, base - apart[0])
    every = [read_exchanges(trace["traceEvents"]) for trace in traces]
    for trace, microseconds in zip(traces, clock_shifts(every, hosts), strict=True):
        _shift(trace, microseconds)
    every = [read_exchanges(trace["traceEvents"]) for trace in traces]
    found: list[ProcessRecording] = []
    for rank, late in enumerate(late_stretches(every)):
        times, said = read_times(traces[rank], late), told[str(rank)]
        exchanges = [e for e in every[rank] if _is_within(e, times.windows)]
        work = {name: Work(*figures) for name, figures in said["work"].items()}
        peak = int(said["peak_memory_bytes"])
        found.append(ProcessRecording(rank, hosts[rank], times, exchanges, late, work, peak))
    return found, _merged(traces)


def _shift(trace: dict[str, Any], microseconds: float) -> None:
    """Move a whole trace in time."""
    for event in trace["traceEvents"] if microseconds else ():
        if "ts" in event:
            event["ts"] += microseconds


def _is_within(exchange: Exchange, windows: Sequence[Interval]) -> bool:
    return any(start <= exchange.begun < end for start, end in windows)


def _merged(traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One trace with a track for each process, its number the rank."""
    events: list[dict[str, Any]] = []
    for rank, trace in enumerate(traces):
        about: dict[str, dict[str, Any]] = {
            "process_name": {"name": f"process {rank + 1} of {len(traces)}"},
            "process_sort_index": {"sort_index": rank},
        }
        events += [
            {"ph": "M", "pid": rank, "tid": 0, "name": name, "args": given}
            for name, given in about.items()
        ]
        for event in trace["traceEvents"]:
            # What Kineto says of the process itself, and of its own recording, is said above.
            is_own = str(event.get("name", "")).startswith("process_")
            if is_own or not isinstance(event.get("pid"), int):
                continue
            moved = {**event, "pid": rank}
            if "id" in event:
                # Arrows of different processes must not meet.
                moved["id"] = f"{rank}-{event['id']}"
            events.append(moved)
    kept = ("schemaVersion", "displayTimeUnit", "baseTimeNanoseconds")
    return {**{name: traces[0][name] for name in kept if name in traces[0]}, "traceEvents": events}


def process_row(process: ProcessRecording) -> ProcessRow:
    """What a process's step consists of."""
    times = process.times
    regions, steps = times.by_region(), times.steps
    step, waiting = times.total_seconds / steps, regions.get(WAITING, 0.0) / steps
    communication = regions.get(COMMUNICATION, 0.0) / steps
    data = regions.get("data", 0.0) / steps
    return ProcessRow(
        process.rank,
        process.host,
        step,
        step - waiting - communication - data,
        communication,
        waiting,
        data,
        _beside(process, process.exchanges) / steps,
        process.peak_memory_bytes,
    )


def collective_rows(process: ProcessRecording, link: float | None) -> list[CollectiveRow]:
    """A process's exchanges by kind, most time first; `link`: bytes per second measured."""
    steps, rows = process.times.steps, list[CollectiveRow]()
    for kind in dict.fromkeys(exchange.kind for exchange in process.exchanges):
        own = [exchange for exchange in process.exchanges if exchange.kind == kind]
        under_way = [(e.begun, e.ended) for e in own]
        waiting = length(common(under_way, process.late)) / 1e6
        seconds = length(under_way) / 1e6
        carried = sum(e.link_bytes for e in own if e.ended > e.begun)
        speed = carried / (seconds - waiting) if carried and seconds > waiting else None
        rows.append(
            CollectiveRow(
                process.rank,
                kind,
                len(own) / steps,
                sum(e.bytes for e in own) / steps,
                seconds / steps,
                waiting / steps,
                _beside(process, own) / steps,
                None if speed is None else speed / 1e9,
                speed / link if speed is not None and link else None,
            )
        )
    return sorted(rows, key=lambda row: -row.seconds)


def _beside(process: ProcessRecording, exchanges: Sequence[Exchange]) -> float:
    """Seconds in which exchanges were under way and the process did not stand still for them."""
    under_way = [(e.begun, e.ended) for e in exchanges]
    return length(without(common(under_way, process.times.windows), process.times.stood)) / 1e6
