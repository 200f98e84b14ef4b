"""Stretches of time as lists of (start, end): what is covered, by one, by both, by one alone.

Recordings of several processes, and of devices, are read with it. Plain arithmetic, any unit.
"""

from collections.abc import Iterable

Interval = tuple[float, float]
"""Start and end, in one unit."""


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """What any of them covers, as intervals that do not meet, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def common(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """What both cover."""
    one, other = union(first), union(second)
    found: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if end > start:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """What the first covers and the second does not."""
    found: list[Interval] = []
    other = union(second)
    for start, end in union(first):
        at = start
        for left, right in common([(start, end)], other):
            found.append((at, left))
            at = right
        found.append((at, end))
    return [(start, end) for start, end in found if end > start]


def length(intervals: Iterable[Interval]) -> float:
    """How much they cover."""
    return sum(end - start for start, end in union(intervals))
