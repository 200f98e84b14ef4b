"""Time is booked under the right region and adds up; work is what the shape says."""

import contextlib
import dataclasses

import pytest

from penstock.compiler.plan import Plan
from penstock.config.load import as_config
from penstock.planning import plan_of
from penstock.profiling.places import BACKWARD_NODE, ELSE, HEAD, Place, region_of_kernel
from penstock.profiling.trace import read_times
from penstock.profiling.work import Held, generation_work, training_work
from penstock.spans import recording, span


def event(name: str, start: float, duration: float, sequence: int = -1, **more: object) -> dict:
    category = "user_annotation" if "/" in name else "cpu_op"
    value = {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1}
    return {**value, "args": {"Sequence number": sequence} if sequence >= 0 else {}, **more}


TRACE = [
    event("warm-up", 0, 50),
    event("phase/step", 100, 1000),
    event("phase/data", 100, 30),
    event("region/block forward", 150, 200),
    event("aten::view", 150, 10, 7),
    event("aten::mm", 160, 100, 7),
    event("aten::copy_", 170, 40),
    event("region/head forward", 350, 100),
    event("aten::mm", 350, 60, 8),
    event("phase/backward", 500, 300),
    event(BACKWARD_NODE + "MmBackward0", 500, 80, 8),
    event(BACKWARD_NODE + "MmBackward0", 580, 120, 7),
    event("aten::mm", 590, 50),
    event(BACKWARD_NODE + "Unknown", 700, 20, 99),
    event("phase/optimizer", 850, 200),
    event("another thread", 100, 900, tid=2),
    {"ph": "i", "name": "[memory]", "ts": 200, "tid": 1, "args": {"Total Allocated": 64}},
    {"ph": "i", "name": "[memory]", "ts": 150, "tid": 1, "args": {"Total Allocated": 32}},
]


def test_time_is_booked_under_its_region_and_adds_up() -> None:
    times = read_times({"traceEvents": TRACE})
    assert times.steps == 1
    assert times.total_seconds == pytest.approx(1e-3)
    regions = {name: round(seconds * 1e6) for name, seconds in times.by_region().items()}
    assert regions == {
        "block forward": 200,
        "optimizer": 200,
        "block backward": 120,
        HEAD: 180,
        "data": 30,
        ELSE: 1000 - 730,
    }
    assert sum(times.seconds.values()) == pytest.approx(times.total_seconds)
    inside = times.seconds[Place("block forward", "", "aten::mm")]
    assert inside == pytest.approx(60e-6), "without the copy inside it"
    assert times.memory == [(pytest.approx(50e-6), 32), (pytest.approx(100e-6), 64)]


def test_a_compiled_kernel_has_a_row_of_its_own() -> None:
    head = [event("region/head forward", 100, 100), event("kernel/head_train", 120, 70)]
    back = [event("phase/backward", 200, 300), event("kernel/block_forward", 210, 100)]
    times = read_times({"traceEvents": [event("phase/step", 0, 600), *head, *back]})
    regions = times.by_region()
    assert regions[HEAD] == pytest.approx(100e-6)
    assert regions["block backward"] == pytest.approx(100e-6), "recomputed"
    assert times.by_kernel() == pytest.approx({"block_forward": 100e-6, "head_train": 70e-6})
    assert times.calls["head_train"] == 1


def test_each_step_s_regions_are_kept_apart() -> None:
    later = [
        {**e, "ts": 2000 + e["ts"] / 2, "dur": e["dur"] / 2} for e in TRACE[1:15] if "dur" in e
    ]
    times = read_times({"traceEvents": [*TRACE, *later]})
    assert times.steps == 2
    assert times.region_steps["optimizer"] == pytest.approx([200e-6, 100e-6])
    assert sum(map(sum, times.region_steps.values())) == pytest.approx(times.total_seconds)


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        read_times({"traceEvents": TRACE[:1]})


@pytest.mark.parametrize(
    ("kernel", "region"),
    [
        ("embed_backward", "embedding backward"),
        ("block_decode_1x256", "block decode"),
        ("block_prefill_16x64", "block prefill"),
        ("head_logits_1", "head"),
        ("attend_backward", "block backward"),
        ("fed_forward", "block forward"),
    ],
)
def test_kernels_belong_to_regions(kernel: str, region: str) -> None:
    assert region_of_kernel(kernel, "") == region


def gpt2_plan(**more: object) -> Plan:
    sections = {"data": {"sequence_length": 512}, "batch": {"micro": 4, "size": 8}}
    target = {"plan": {"target": "zen5-2core"}}
    return plan_of(as_config({"model": {"preset": "gpt2"}, **sections, **target, **more}), None)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_regions_flops_are_the_step_s(compiled: bool) -> None:
    """6N + 12·L·D·T per token (PaLM, appendix B), from the model's shape alone."""
    plan = gpt2_plan()
    work = training_work(plan, compiled=compiled)
    norms = work.pop("gradient norm").flops
    total = sum(region.flops for region in work.values())
    assert total == pytest.approx(plan.tokens_per_step * plan.flops_per_token, rel=2e-3)
    assert norms < 1e-3 * total
    blocks = [work["block forward"].flops, work["block backward"].flops]
    assert blocks[1] == pytest.approx(2 * blocks[0])


def test_the_optimizer_s_bytes_are_its_state_s() -> None:
    """Masters and two moments read and written, bf16 gradients read, bf16 weights written."""
    plan = gpt2_plan(precision={"compute": "bf16"})
    parameters = plan.architecture.parameter_count(padded=True)
    assert training_work(plan, compiled=True)["optimizer"].bytes == parameters * (24 + 2 + 2)


def test_decoding_reads_every_weight_once_per_pass() -> None:
    a = gpt2_plan().architecture
    work = generation_work(a, "bf16", [(1, 32, 0), (1, 1, 32), (1, 1, 33)])
    weights = a.layers * a.block_parameters() * 2
    cache = a.layers * 2 * a.kv_size * 2
    assert work["block decode"].bytes == 2 * weights + cache * (33 + 34)
    assert work["block prefill"].bytes == weights + cache * 32
    assert work["head"].flops == 3 * 2 * a.padded_vocab_size * a.hidden_size


def test_spans_cost_nothing_and_say_nothing_until_recorded() -> None:
    seen: list[str] = []

    def recorder(name: str) -> contextlib.AbstractContextManager[None]:
        seen.append(name)
        return contextlib.nullcontext()

    with span("before"):
        pass
    assert span("a") is span("b"), "one object for all"
    with recording(recorder), span("during"):
        pass
    with span("after"):
        pass
    assert seen == ["during"]


def test_stages_and_parts_do_the_whole_model_s_work_together() -> None:
    plan = gpt2_plan()
    a = plan.architecture
    total = a.parameter_count(padded=True)
    first = training_work(plan, compiled=True, held=Held(7, True, False, total // 2))
    last = training_work(plan, compiled=True, held=Held(a.layers - 7, False, True, total // 2))
    whole = training_work(plan, compiled=True)
    for region, work in whole.items():
        shares = [part[region].flops for part in (first, last) if region in part]
        assert sum(shares) == pytest.approx(work.flops)
    part = training_work(dataclasses.replace(plan, tensor=2), compiled=True)
    assert part["block forward"].flops == pytest.approx(whole["block forward"].flops / 2, rel=1e-2)
