"""Where the time of a recorded trace went: by region, by kernel, by operation.

`profiling/session.py` hands over the trace that torch wrote (Chrome's trace event format); it must
never import torch. Time is self time: of an operation without those inside it, so that all rows
add up to the recorded steps. Where a GPU worked it is the GPU's (`profiling/device.py`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from penstock.profiling.communication import is_course
from penstock.profiling.device import WAITING, Host, book_device, device_work, has_device
from penstock.profiling.intervals import Interval, common, length
from penstock.profiling.places import (
    COMMUNICATION,
    STEP,
    WAIT,
    Node,
    Place,
    Within,
    placed,
    regions_by_sequence,
    steps_of,
    tree,
)

_OF_THREADS = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
"""Categories of what threads do, as Kineto writes them."""


@dataclasses.dataclass
class Times:
    """Seconds and calls of all recorded steps together."""

    step_seconds: list[float] = dataclasses.field(default_factory=list[float])
    """Of each recorded step."""
    seconds: dict[Place, float] = dataclasses.field(default_factory=dict[Place, float])
    region_steps: dict[str, list[float]] = dataclasses.field(default_factory=dict[str, list[float]])
    """Seconds of each region in each step that has it."""
    operations: dict[Place, int] = dataclasses.field(default_factory=dict[Place, int])
    """How often each operation ran."""
    calls: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """How often each region and each kernel ran."""
    memory: list[tuple[float, int]] = dataclasses.field(default_factory=list[tuple[float, int]])
    """(seconds since the first step, bytes that tensors hold beyond what they held before)."""
    windows: list[Interval] = dataclasses.field(default_factory=list[Interval])
    """Start and end of each recorded step, microseconds of the trace."""
    stood: list[Interval] = dataclasses.field(default_factory=list[Interval])
    """In which communication was all that went on, likewise."""

    @property
    def steps(self) -> int:
        """How many were recorded."""
        return len(self.step_seconds)

    @property
    def total_seconds(self) -> float:
        """All steps together."""
        return sum(self.step_seconds)

    def by_region(self) -> dict[str, float]:
        """Seconds of each region, most first."""
        return _sorted_sums((place.region, s) for place, s in self.seconds.items())

    def by_kernel(self) -> dict[str, float]:
        """Seconds of each compiled kernel, most first."""
        return _sorted_sums((p.kernel, s) for p, s in self.seconds.items() if p.kernel)

    def book(self, place: Place, seconds: float, operations: int = 1) -> None:
        """Add an operation's time."""
        self.seconds[place] = self.seconds.get(place, 0.0) + seconds
        self.operations[place] = self.operations.get(place, 0) + operations


def read_times(trace: dict[str, Any], late: Sequence[Interval] = ()) -> Times:
    """Add up a trace; ValueError when it holds no step.

    `late`: microseconds of the trace in which another process was waited for.
    """
    events = [e for e in trace["traceEvents"] if "ts" in e]
    steps = [e for e in events if e.get("name") == STEP and e.get("cat") == "user_annotation"]
    if not steps:
        raise ValueError("the trace holds no step")
    thread, on_device = steps[0]["tid"], has_device(events)
    times = Times()
    for step in steps_of(_roots(events, thread)):
        times.step_seconds.append(step.seconds)
        times.windows.append((step.start, step.end))
        before = times.by_region()
        if on_device:
            _book_device(step, events, thread, late, times)
        else:
            _book(step, late, times)
        for region, seconds in times.by_region().items():
            times.region_steps.setdefault(region, []).append(seconds - before.get(region, 0.0))
    times.memory = _memory(events, times.windows[0][0], on_device=on_device)
    return times


def _roots(events: Sequence[dict[str, Any]], thread: object) -> list[Node]:
    """What one thread did. The course of an exchange may be told on it, beside what it does."""
    return tree(
        e
        for e in events
        if e.get("ph") == "X"
        and e.get("tid") == thread
        and e.get("cat") in _OF_THREADS
        and not is_course(e)
    )


def _book(step: Node, late: Sequence[Interval], times: Times) -> None:
    """Book every node's own time under its place."""
    for node, place, called in placed(step, regions_by_sequence(step)):
        seconds = node.own_seconds
        if called:
            times.calls[called] = times.calls.get(called, 0) + 1
        if place.region == COMMUNICATION:
            times.stood.append((node.start, node.end))
        if place.region == COMMUNICATION and place.operation == WAIT:
            waited = min(seconds, length(common([(node.start, node.end)], late)) / 1e6)
            if waited > 0:
                times.book(Place(WAITING, "", WAIT), waited)
            seconds -= waited
        times.book(place, seconds)


def _book_device(
    step: Node, events: Sequence[dict[str, Any]], thread: object, late: Sequence[Interval], t: Times
) -> None:
    """Book the device's time. A GPU's backward pass is launched by a thread of its own."""
    forward, launched = regions_by_sequence(step), dict[int, Place]()
    data, communication = list[Interval](), list[Interval]()
    others = {e["tid"] for e in events if e.get("cat") == "cuda_runtime"} - {thread}
    roots = [(step, Within())]
    for other in others:
        inside = [n for n in _roots(events, other) if step.start <= n.start < step.end]
        roots += [(node, Within(phase="backward")) for node in inside]
    for root, within in roots:
        for node, place, called in placed(root, forward, within):
            if called:
                t.calls[called] = t.calls.get(called, 0) + 1
            if node.correlation is not None:
                launched[node.correlation] = place
            if root is step and place.region == COMMUNICATION:
                communication.append((node.start, node.end))
            elif root is step and place.region == "data":
                data.append((node.start, node.end))
    window = (step.start, step.end)
    work = [w for w in device_work(events, launched) if window[0] <= w.start < window[1]]
    booked, stood = book_device(window, work, Host(data, communication, late))
    t.stood += stood
    for place, microseconds in booked.items():
        t.book(place, microseconds / 1e6, sum(w.place == place for w in work) or 1)


def _memory(
    events: list[dict[str, Any]], start: float, *, on_device: bool
) -> list[tuple[float, int]]:
    """What tensors hold over time, as torch's allocator of the device reported it."""
    found: list[tuple[float, int]] = []
    for event in events:
        given = event.get("args", {})
        total = given.get("Total Allocated")
        # c10::DeviceType: 0 is the CPU, 1 CUDA.
        is_here = given.get("Device Type", 0) == int(on_device)
        if event.get("name") == "[memory]" and total is not None and is_here:
            found.append(((float(event["ts"]) - start) / 1e6, int(total)))
    return sorted(found)


def _sorted_sums(pairs: Iterator[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, seconds in pairs:
        sums[name] = sums.get(name, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
