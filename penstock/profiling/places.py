"""What the events of a trace are inside of, and so what their time is booked under.

`profiling/trace.py` books by it, `profiling/device.py` finds what launched a device's kernels. It
must never import torch.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

BACKWARD_NODE = "autograd::engine::evaluate_function: "
STEP = "phase/step"
ELSE = "everything else"
HEAD = "head, forward and backward"
"""One region, with kernels and without: its gradients are computed with the loss."""
COMMUNICATION = "communication"
"""What a process does, or stands still, to hear of the others."""
WAIT = "wait"
"""The operation of standing still until a collective is done."""
MACHINE_CODE = "machine code (not split further)"
"""A compiled kernel without the operations that torch's profiler sees inside."""
_PYTHON = "Python and dispatch"
_REGIONS = {"embed": "embedding", **dict.fromkeys(("attend", "attended", "feed", "fed"), "block")}
"""What kernels' names begin with → region, where it is another; a divided block has several
(`compiler/split_regions.py`)."""
_OF_OPTIMIZER = {"adamw": "optimizer", "squares": "gradient norm"}
"""Kernels of no part of the model → region."""
_DIVIDED = ("FSDP::", "fsdp::")
"""How torch's FSDP2 names what it does around collectives: copies into their buffers and out."""


@dataclasses.dataclass
class Node:
    """One event and those inside it. Times in microseconds."""

    name: str
    start: float
    seconds: float
    """Duration, in seconds."""
    sequence: int = -1
    """Autograd's number that a forward operation and its backward node share; -1 without one."""
    correlation: int | None = None
    """Number that a call of the device's runtime shares with what it started there."""
    children: list["Node"] = dataclasses.field(default_factory=list["Node"])

    @property
    def end(self) -> float:
        """In microseconds."""
        return self.start + self.seconds * 1e6

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


@dataclasses.dataclass(frozen=True)
class Within:
    """What a node is inside of."""

    region: str = ""
    kernel: str = ""
    phase: str = ""


def region_of_kernel(kernel: str, phase: str) -> str:
    """The region a compiled kernel belongs to; a forward kernel in the backward pass recomputes."""
    if kernel in _OF_OPTIMIZER:
        return _OF_OPTIMIZER[kernel]
    part, _, rest = kernel.partition("_")
    name = _REGIONS.get(part, part)
    if kernel == "head_train":
        return HEAD
    kind = rest.split("_")[0]
    if kind == "forward" and phase == "backward":
        kind = "backward"
    return name if part == "head" else f"{name} {kind}"


def tree(events: Iterable[dict[str, Any]]) -> list[Node]:
    """Events of one thread, nested by time."""
    roots: list[Node] = []
    open_nodes: list[Node] = []
    for event in sorted(events, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
        start, duration = float(event["ts"]), float(event["dur"])
        given = event.get("args", {})
        number = int(given.get("Sequence number", -1))
        node = Node(str(event["name"]), start, duration / 1e6, number, given.get("correlation"))
        while open_nodes and start >= open_nodes[-1].end:
            open_nodes.pop()
        (open_nodes[-1].children if open_nodes else roots).append(node)
        open_nodes.append(node)
    return roots


def steps_of(nodes: Iterable[Node]) -> Iterator[Node]:
    """The recorded steps, wherever they are nested."""
    for node in nodes:
        if node.name == STEP:
            yield node
        else:
            yield from steps_of(node.children)


def regions_by_sequence(step: Node) -> dict[int, str]:
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


def placed(
    node: Node, forward: dict[int, str], within: Within = Within()
) -> Iterator[tuple[Node, Place, str]]:
    """A node and all inside it, each with its place, and the region, kernel or phase that it is a
    call of ("": of none).

    `forward`: what `regions_by_sequence` found.
    """
    inside, operation, called = _entered(node, forward, within)
    yield node, Place(inside.region or ELSE, inside.kernel, operation), called
    for child in node.children:
        yield from placed(child, forward, inside)


def _entered(node: Node, forward: dict[int, str], within: Within) -> tuple[Within, str, str]:
    """What is inside a node is inside of; the node's operation, and what it is a call of."""
    phase = within.phase
    kind, _, name = node.name.partition("/")
    if kind == "phase":
        region = ELSE if name in ("step", "forward", "backward") else name
        return Within(region, within.kernel, name), _PYTHON, name
    if kind == "region":
        region = name.replace(" forward", " backward") if phase == "backward" else name
        region = HEAD if name == "head forward" else region
        return Within(region, within.kernel, phase), _PYTHON, region
    if kind == "kernel":
        return Within(region_of_kernel(name, phase), name, phase), MACHINE_CODE, name
    if kind == "collective" or node.name.startswith(_DIVIDED):
        operation = (name or node.name).partition(" ")[0]
        called = COMMUNICATION if name and operation != WAIT else ""
        return Within(COMMUNICATION, "", phase), operation, called
    if not node.name.startswith(BACKWARD_NODE):
        return within, node.name, ""
    source = forward.get(node.sequence, "")
    region = f"{source} backward" if source else ELSE
    region = HEAD if source == "head" else region
    return Within(region, within.kernel, phase), node.name.removeprefix(BACKWARD_NODE), ""
