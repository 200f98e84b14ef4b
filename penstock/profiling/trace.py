"""Where the time of a recorded trace went: by region, by kernel, by operation.

`profiling/session.py` hands over the trace that torch wrote (Chrome's trace event format); it must
never import torch. Time is self time: of an operation without those inside it, so that all rows
add up to the recorded steps.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

BACKWARD_NODE = "autograd::engine::evaluate_function: "
_STEP = "phase/step"
ELSE = "everything else"
HEAD = "head, forward and backward"
"""Compiled, they are one kernel."""
MACHINE_CODE = "machine code (not split further)"
"""A compiled kernel without the operations that torch's profiler sees inside."""
_PYTHON = "Python and dispatch"


@dataclasses.dataclass
class Node:
    """One event and those inside it. Times in microseconds."""

    name: str
    start: float
    seconds: float
    """Duration, in seconds."""
    sequence: int
    """Autograd's number that a forward operation and its backward node share; -1 without one."""
    children: list["Node"] = dataclasses.field(default_factory=list["Node"])

    @property
    def own_seconds(self) -> float:
        """Without what is inside."""
        return max(0.0, self.seconds - sum(child.seconds for child in self.children))


@dataclasses.dataclass(frozen=True)
class Place:
    """What time is booked under."""

    region: str
    kernel: str
    """Compiled kernel; empty where operations run one by one."""
    operation: str


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


def read_times(trace: dict[str, Any]) -> Times:
    """Add up a trace; ValueError when it holds no step."""
    events = [e for e in trace["traceEvents"] if "ts" in e]
    steps = [e for e in events if e.get("name") == _STEP and e.get("ph") == "X"]
    if not steps:
        raise ValueError("the trace holds no step")
    thread = steps[0]["tid"]
    roots = _tree(
        e
        for e in events
        if e.get("ph") == "X"
        and e.get("tid") == thread
        and e.get("cat") in ("cpu_op", "user_annotation")
    )
    times = Times()
    for root in _steps(roots):
        times.step_seconds.append(root.seconds)
        before = times.by_region()
        _book(root, "", "", "", _regions_by_sequence(root), times)
        if times.calls.get(HEAD):
            _join_head(times)
        for region, seconds in times.by_region().items():
            times.region_steps.setdefault(region, []).append(seconds - before.get(region, 0.0))
    times.memory = _memory(events, min(float(step["ts"]) for step in steps))
    return times


def _join_head(times: Times) -> None:
    """Book what runs around the head's one kernel with it."""
    for place in [p for p in times.seconds if p.region in ("head forward", "head backward")]:
        joined = dataclasses.replace(place, region=HEAD)
        times.seconds[joined] = times.seconds.get(joined, 0.0) + times.seconds.pop(place)
        times.operations[joined] = times.operations.get(joined, 0) + times.operations.pop(place)


def region_of_kernel(kernel: str, phase: str) -> str:
    """The region a compiled kernel belongs to; a forward kernel in the backward pass recomputes."""
    part, _, rest = kernel.partition("_")
    name = {"embed": "embedding"}.get(part, part)
    if kernel == "head_train":
        return HEAD
    kind = rest.split("_")[0]
    if kind == "forward" and phase == "backward":
        kind = "backward"
    return name if part == "head" else f"{name} {kind}"


def _tree(events: Iterator[dict[str, Any]]) -> list[Node]:
    """Events nested by time."""
    roots: list[Node] = []
    open_nodes: list[Node] = []
    for event in sorted(events, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
        start, duration = float(event["ts"]), float(event["dur"])
        number = event.get("args", {}).get("Sequence number", -1)
        node = Node(str(event["name"]), start, duration / 1e6, int(number))
        while open_nodes and start >= open_nodes[-1].start + open_nodes[-1].seconds * 1e6:
            open_nodes.pop()
        (open_nodes[-1].children if open_nodes else roots).append(node)
        open_nodes.append(node)
    return roots


def _steps(nodes: list[Node]) -> Iterator[Node]:
    for node in nodes:
        if node.name == _STEP:
            yield node
        else:
            yield from _steps(node.children)


def _regions_by_sequence(step: Node) -> dict[int, str]:
    """Autograd's number → region whose forward pass made the node.

    The last operation of a number counts: those before it only looked at the number to come.
    """
    found: dict[int, str] = {}

    def visit(node: Node, region: str) -> None:
        if node.name == "phase/backward":
            return
        if node.name.startswith("region/"):
            region = node.name.removeprefix("region/").removesuffix(" forward")
        if node.sequence >= 0:
            found[node.sequence] = region
        for child in node.children:
            visit(child, region)

    visit(step, "")
    return found


def _book(
    node: Node, region: str, kernel: str, phase: str, forward: dict[int, str], times: Times
) -> None:
    """Book a node's own time, and what is inside, under its region and kernel."""
    kind, _, name = node.name.partition("/")
    operation = node.name
    if kind == "phase":
        phase, region, operation = name, name, _PYTHON
        times.calls[name] = times.calls.get(name, 0) + 1
        if name in ("step", "forward", "backward"):
            region = ELSE
    elif kind == "region":
        region, operation = name, _PYTHON
        if phase == "backward":  # recomputed
            region = name.replace(" forward", " backward")
        times.calls[region] = times.calls.get(region, 0) + 1
    elif kind == "kernel":
        region, kernel, operation = region_of_kernel(name, phase), name, MACHINE_CODE
        times.calls[region] = times.calls.get(region, 0) + (region == HEAD)
        times.calls[kernel] = times.calls.get(kernel, 0) + 1
    elif node.name.startswith(BACKWARD_NODE):
        operation = node.name.removeprefix(BACKWARD_NODE)
        source = forward.get(node.sequence, "")
        region = f"{source} backward" if source else ELSE
    place = Place(region or ELSE, kernel, operation)
    times.seconds[place] = times.seconds.get(place, 0.0) + node.own_seconds
    times.operations[place] = times.operations.get(place, 0) + 1
    for child in node.children:
        _book(child, region, kernel, phase, forward, times)


def _memory(events: list[dict[str, Any]], start: float) -> list[tuple[float, int]]:
    """What tensors hold over time, as torch's allocator reported it."""
    found: list[tuple[float, int]] = []
    for event in events:
        total = event.get("args", {}).get("Total Allocated")
        if event.get("name") == "[memory]" and total is not None:
            found.append(((float(event["ts"]) - start) / 1e6, int(total)))
    return sorted(found)


def _sorted_sums(pairs: Iterator[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, seconds in pairs:
        sums[name] = sums.get(name, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
