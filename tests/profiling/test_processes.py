"""`penstock profile` of several processes: whose time went where, what links bore, one trace."""

import gzip
import json
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.config.load import as_config
from penstock.models.resolve import resolve_architecture
from penstock.profiling.processes import trace_name
from tests.test_cli import fails

TINY = ["model.preset=gpt2-tiny", "compile.mode=off", "precision.compute=fp32"]
TINY += ["batch.micro=2", "batch.size=8", "profile.steps=2", "profile.warmup_steps=1"]
FLOAT = 4


def profiled(out: Path, dataset: Path, *words: str) -> dict:
    """What two processes leave, held to what is true of every way to divide a job."""
    given = [*TINY, f"data.path={dataset}", f"out={out}", *words]
    assert main(["profile", "--processes", "2", *given, "--quiet"]) == 0
    value = json.loads((out / "profile.json").read_text())
    assert [row["rank"] for row in value["processes"]] == [0, 1]
    parts = ("work", "communication", "waiting", "data")
    for row, regions in zip(value["processes"], value["process_regions"], strict=True):
        assert sum(r["share"] for r in regions) == pytest.approx(1)
        assert sum(row[f"{part}_seconds"] for part in parts) == pytest.approx(row["step_seconds"])
        assert all(row[f"{part}_seconds"] >= 0 for part in parts)
        found = {r["name"]: r["seconds"] for r in regions}
        assert found["communication"] == pytest.approx(row["communication_seconds"])
        assert row["peak_memory_bytes"] > 100 << 20
    assert value["regions"] == value["process_regions"][0]
    for row in value["collectives"]:
        assert 0 <= row["waiting_seconds"] <= row["seconds"]
        assert 0 <= row["beside_seconds"] <= row["seconds"]
    assert_one_track_each(out)
    page = (out / "profile.html").read_text()
    assert "process 2" in page
    assert "Communication by collective" in page
    return value


def assert_one_track_each(out: Path) -> None:
    """The trace is JSON; each process has one track, with all that its own trace has."""
    trace = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))
    events = trace["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1}
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "process 1 of 2", 1: "process 2 of 2"}
    for rank in (0, 1):
        own = json.loads(gzip.decompress((out / trace_name(rank, 2)).read_bytes()))
        assert own["distributedInfo"]["rank"] == rank
        own_steps, steps = (
            [e["dur"] for e in every if e.get("name") == "phase/step" and e.get("ph") == "X"]
            for every in (own["traceEvents"], [e for e in events if e["pid"] == rank])
        )
        assert steps == own_steps
        assert len(steps) == 2
    # Steps end in a sum over all: on one clock they cannot be a step apart.
    first, second = (
        [e for e in events if e["name"] == "phase/step" and e["pid"] == rank and e["ph"] == "X"]
        for rank in (0, 1)
    )
    for one, other in zip(first, second, strict=True):
        assert one["ts"] < other["ts"] + other["dur"]
        assert other["ts"] < one["ts"] + one["dur"]


def moved(value: dict, rank: int) -> dict[str, float]:
    """Bytes of each kind of exchange in one step."""
    return {row["kind"]: row["bytes"] for row in value["collectives"] if row["rank"] == rank}


def tiny_parameters() -> int:
    return resolve_architecture(
        as_config({"model": {"preset": "gpt2-tiny"}}).model
    ).parameter_count()


FIGURES = FLOAT + FLOAT + 3 * 8
"""Loss weights and loss, float32; every process's seconds and whether to stop, float64."""


@pytest.mark.distributed
def test_replicas_sum_their_gradients_once_a_step(dataset_folder: Path, tmp_path: Path) -> None:
    value = profiled(tmp_path, dataset_folder)
    for rank in (0, 1):
        assert moved(value, rank) == {"all_reduce": FLOAT * tiny_parameters() + FIGURES}
    assert "2 replicas" in value["facts"]["processes"]
    row = next(r for r in value["collectives"] if r["rank"] == 0)
    assert row["gigabytes_per_second"] > 0, "gloo's course was found"
    assert {"block forward", "block backward"} <= {r["name"] for r in value["process_regions"][1]}


@pytest.mark.slow
@pytest.mark.distributed
def test_divided_weights_are_gathered_and_gradients_scattered(
    dataset_folder: Path, tmp_path: Path
) -> None:
    value = profiled(tmp_path, dataset_folder, "plan.shard=weights")
    found, micro_batches = moved(value, 0), 2
    whole = FLOAT * tiny_parameters()
    # Each micro-batch scatters all gradients; FSDP2 pads what does not divide by two.
    assert found["reduce_scatter"] == pytest.approx(micro_batches * whole, rel=1e-2)
    # Blocks are gathered in the forward pass and in the backward pass, what the root has once.
    assert micro_batches * whole * 0.99 <= found["all_gather"] <= 2 * micro_batches * whole * 1.01
    assert found["all_reduce"] == FIGURES + 8, "and the norm's square, float64"


@pytest.mark.slow
@pytest.mark.distributed
def test_stages_send_activations_and_gradients(dataset_folder: Path, tmp_path: Path) -> None:
    value = profiled(tmp_path, dataset_folder, "plan.stages=2", "plan.layers_per_stage=[1,1]")
    a = resolve_architecture(as_config({"model": {"preset": "gpt2-tiny"}}).model)
    activations = 8 * 64 * a.hidden_size * FLOAT
    first, last = moved(value, 0), moved(value, 1)
    assert (first["send"], first["recv"]) == (activations, activations)
    assert (last["send"], last["recv"]) == (activations, activations)
    regions = [{row["name"] for row in own} for own in value["process_regions"]]
    assert "embedding forward" in regions[0]
    assert "embedding forward" not in regions[1]
    assert "head, forward and backward" in regions[1]
    assert "head, forward and backward" not in regions[0]
    forward = [
        row["flops"]
        for own in value["process_regions"]
        for row in own
        if row["name"] == "block forward"
    ]
    assert forward[0] == forward[1] > 0, "a block each"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mode=generate", "generate.prompt=x", "run=/nowhere"], "by one process"),
        (["mode=evaluate"], "does not record mode=evaluate"),
        (["launch.hosts=2", "data.path=/nowhere"], "need a place to meet"),
    ],
)
def test_what_several_processes_do_not_record_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model.preset=gpt2-tiny", "compile.mode=off", f"out={tmp_path / 'out'}", *words]
    assert message in fails(capsys, "profile", "--processes", "2", *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_plan_for_other_processes_is_one_line(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        *TINY,
        f"data.path={dataset_folder}",
        f"out={tmp_path / 'out'}",
        "plan.replicas=3",
        "batch.size=12",
    ]
    said = fails(capsys, "profile", "--processes", "2", *given)
    assert "the plan is for 3 replicas, the job has 2 processes" in said
