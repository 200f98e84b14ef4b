"""Exchanges and devices in traces made by hand: every microsecond is known."""

import pytest

from penstock.profiling.communication import (
    Exchange,
    clock_shifts,
    late_stretches,
    read_exchanges,
)
from penstock.profiling.device import IDLE, WAITING
from penstock.profiling.intervals import common, length, union, without
from penstock.profiling.places import BACKWARD_NODE, COMMUNICATION
from penstock.profiling.trace import read_times


def event(name: str, start: float, duration: float, category: str = "", **more: object) -> dict:
    chosen = category or ("user_annotation" if "/" in name or ":" in name[:5] else "cpu_op")
    return {
        **{"ph": "X", "cat": chosen, "name": name, "ts": start, "dur": duration, "tid": 1},
        **more,
    }


def test_intervals() -> None:
    assert union([(3, 5), (0, 2), (1, 3), (7, 7)]) == [(0, 5)]
    assert common([(0, 4), (6, 9)], [(3, 7), (8, 20)]) == [(3, 4), (6, 7), (8, 9)]
    assert without([(0, 10)], [(2, 3), (5, 20)]) == [(0, 2), (3, 5)]
    assert length([(0, 2), (1, 3)]) == 3


def process(came: float, scattered: float) -> list[dict]:
    """A step of one of two: a sum that this one comes to at `came`, rows scattered meanwhile."""
    return [
        event("phase/step", 0, 100),
        event("collective/reduce_scatter 4096 bytes among 0,1", scattered, 2),
        event("gloo:all_reduce", scattered + 1, 20, tid=7),
        event("collective/all_reduce 1000 bytes among 0,1", came, 2),
        event("c10d::allreduce_", came + 1, 1),
        event("gloo:all_reduce", came + 1, 71 - came, tid=8),
        event("collective/wait", came + 2, 70 - came),
    ]


def test_who_comes_first_waits_for_the_other() -> None:
    traces = [process(30, 2), process(50, 2)]
    every = [read_exchanges(trace) for trace in traces]
    assert [e.kind for e in every[0]] == ["reduce_scatter", "all_reduce"]
    assert [e.link_bytes for e in every[0]] == [2048, 1000]
    assert (every[0][1].begun, every[0][1].ended) == (31, 72)
    late = late_stretches(every)
    assert late == [[(31, 51)], []]
    found = [
        {
            name: round(seconds * 1e6)
            for name, seconds in read_times(trace, stretch).by_region().items()
        }
        for trace, stretch in zip(({"traceEvents": events} for events in traces), late, strict=True)
    ]
    # Asking for both takes 4; the first then waits 40, of which the other was away for 32 to 51.
    assert found[0] == {"everything else": 56, COMMUNICATION: 25, WAITING: 19}
    assert found[1] == {"everything else": 76, COMMUNICATION: 24}


def test_messages_meet_by_sender_and_receiver() -> None:
    sent = Exchange("send", 64, (0, 1), 20, 22)
    received = Exchange("recv", 64, (0, 1), 5, 23)
    other = Exchange("send", 64, (1, 0), 1, 2)
    assert late_stretches([[sent], [other, received]]) == [[], [(5, 20)]]


def test_clocks_of_other_hosts_are_set_by_the_sums_all_end_together() -> None:
    first = [Exchange("all_reduce", 8, (0, 1, 2), at, at + 10) for at in (0, 50, 100)]
    away = [Exchange("all_reduce", 8, (0, 1, 2), at, at + 10) for at in (998, 1050, 1103)]
    assert clock_shifts([first, first, away], ["a", "a", "b"]) == [0, 0, -1000]


def kernel(name: str, start: float, duration: float, correlation: int, stream: int = 7) -> dict:
    return event(
        name, start, duration, "kernel", pid=0, tid=stream, args={"correlation": correlation}
    )


def call(start: float, correlation: int, thread: int = 1) -> dict:
    return event(
        "cudaLaunchKernel", start, 1, "cuda_runtime", tid=thread, args={"correlation": correlation}
    )


def test_a_gpu_s_time_is_booked_by_what_launched_its_kernels() -> None:
    """Launched in no time, run later; the backward pass by a thread of its own; a sum on another
    stream, half of it beside a kernel.
    """
    trace = [
        event("phase/step", 0, 200),
        event("phase/data", 0, 10),
        event("region/block forward", 10, 10),
        event("aten::mm", 11, 5, args={"Sequence number": 3}),
        call(12, 1),
        event(BACKWARD_NODE + "MmBackward0", 22, 5, tid=2, args={"Sequence number": 3}),
        call(23, 2, thread=2),
        event("collective/all_reduce 4096 bytes among 0,1", 30, 4),
        call(31, 3),
        event("phase/optimizer", 40, 5),
        call(41, 4),
        kernel("void gemm<float>(int)", 20, 30, 1),
        kernel("void gemm<float>(int)", 50, 50, 2),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(args)", 80, 60, 3, stream=20),
        kernel("adamw", 150, 40, 4),
    ]
    times = read_times({"traceEvents": trace}, [(80, 110)])
    found = {name: round(seconds * 1e6) for name, seconds in times.by_region().items()}
    assert found == {
        "block forward": 30,
        "block backward": 50,
        "optimizer": 40,
        WAITING: 10,
        COMMUNICATION: 30,
        "data": 10,
        IDLE: 10 + 10 + 10,
    }
    assert sum(found.values()) == 200
    (exchange,) = read_exchanges(trace)
    assert (exchange.begun, exchange.ended, exchange.bytes) == (80, 140, 4096)
    beside = without([(exchange.begun, exchange.ended)], times.stood)
    assert beside == [(80, 100)], "while the backward pass ran"
    assert {place.operation for place in times.seconds} >= {"gemm", "adamw"}
    assert sum(times.region_steps["optimizer"]) == pytest.approx(40e-6)
