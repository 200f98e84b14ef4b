"""Where a GPU's time went: its kernels booked under what launched them, and what it waited for.

`profiling/trace.py` calls it where a trace has a device's work. Every moment of a step is booked
once: kernels that run side by side under the one that began first, exchanges only where nothing is
computed meanwhile. Times are microseconds. It must never import torch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.profiling.communication import is_course
from penstock.profiling.intervals import Interval, common, without
from penstock.profiling.places import COMMUNICATION, ELSE, Place

WAITING = "waiting for others"
"""Communication before the last process had come."""
IDLE = "device waits for the program"
"""Nothing runs on the device, and no data or message is waited for."""
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what a device does, as Kineto writes them."""


@dataclasses.dataclass(frozen=True)
class DeviceWork:
    """One kernel, copy or fill on the device."""

    place: Place
    start: float
    end: float
    is_exchange: bool
    """Whether it is one of NCCL's."""


@dataclasses.dataclass(frozen=True)
class Host:
    """What the process did meanwhile that a device without work may have waited for."""

    data: list[Interval]
    communication: list[Interval]
    late: Sequence[Interval]
    """In which another process was waited for."""


def has_device(events: Sequence[dict[str, Any]]) -> bool:
    """Whether a trace has the work of a GPU."""
    return any(event.get("cat") in _WORK for event in events)


def device_work(
    events: Sequence[dict[str, Any]], launched: Mapping[int, Place]
) -> list[DeviceWork]:
    """A trace's work on the device, by start; `launched`: the places of the calls that began it, by
    the number they share.
    """
    found: list[DeviceWork] = []
    for event in events:
        if event.get("cat") not in _WORK or event.get("ph") != "X":
            continue
        source = launched.get(event.get("args", {}).get("correlation", -1))
        start, is_exchange = float(event["ts"]), is_course(event)
        region = ELSE if source is None else source.region
        place = Place(COMMUNICATION if is_exchange else region, "", _short(str(event["name"])))
        found.append(DeviceWork(place, start, start + float(event["dur"]), is_exchange))
    return sorted(found, key=lambda work: work.start)


def book_device(
    window: Interval, work: Sequence[DeviceWork], host: Host
) -> tuple[dict[Place, float], list[Interval]]:
    """Microseconds of each place in a window of time, and the stretches in which the device stood
    still for communication.
    """
    booked: dict[Place, float] = {}

    def book(place: Place, intervals: list[Interval]) -> None:
        amount = sum(end - start for start, end in intervals)
        if amount > 0:
            booked[place] = booked.get(place, 0.0) + amount

    at, gaps = window[0], list[Interval]()
    for item in (item for item in work if not item.is_exchange):
        start, end = max(item.start, at), min(item.end, window[1])
        if end <= start:
            continue
        gaps.append((at, start))
        book(item.place, [(start, end)])
        at = end
    gaps.append((at, window[1]))
    exchanges = [(item.start, item.end) for item in work if item.is_exchange]
    stood: list[Interval] = []
    for operation, intervals in (("kernels", exchanges), ("host", host.communication)):
        still = common(gaps, intervals)
        book(Place(WAITING, "", operation), common(still, host.late))
        book(Place(COMMUNICATION, "", operation), without(still, host.late))
        stood += still
        gaps = without(gaps, intervals)
    book(Place("data", "", "host"), common(gaps, host.data))
    book(Place(IDLE, "", "no kernel runs"), without(gaps, host.data))
    return booked, stood


def _short(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    return name.removeprefix("void ").partition("<")[0].partition("(")[0].strip() or name
