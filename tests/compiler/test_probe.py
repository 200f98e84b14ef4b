"""Measured speeds: remembered, the best of them kept, nonsense measured anew."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.compiler.probe import (
    Speeds,
    _best_seconds,
    detected_target,
    measured_speeds,
)
from penstock.report.doctor import examine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def remembered(cache: Path) -> Path:
    (path,) = (cache / "penstock" / "probe").glob("*.json")
    return path


def test_speeds_are_measured_once_and_then_need_no_torch(cache: Path) -> None:
    first = measured_speeds("cpu")
    assert all(figure > 1e8 for figure in dataclasses.astuple(first)[:3])
    assert first.link_bytes_per_second is None
    assert set(first.products_flops) == {"bf16", "fp32"}
    assert 1e8 < first.loops_flops < 1e14
    assert measured_speeds("cpu") == first
    code = (
        "import sys; from penstock.compiler.probe import detected_target; "
        "target = detected_target('cpu'); assert target.measured; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_busy_moment_does_not_replace_a_better_measurement(cache: Path) -> None:
    measured_speeds("cpu")
    path = remembered(cache)
    path.write_text(json.dumps(dataclasses.asdict(Speeds(1e18, 1.0, 1e18))))
    now = measured_speeds("cpu", again=True)
    assert now.bf16_flops < 1e18
    kept = measured_speeds("cpu")
    assert (kept.bf16_flops, kept.fp32_flops) == (1e18, now.fp32_flops)
    # Two processes of one machine send more than a fast network card and less than memory copies.
    assert 1e7 < kept.link_bytes_per_second < 1e11
    assert kept.link_bytes_per_second == now.link_bytes_per_second
    parts = detected_target("cpu").shared_by(2)
    assert parts.link_bytes_per_second == kept.link_bytes_per_second


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"bf16_flops": "fast"}', '{"bf16_flops": NaN, "fp32_flops": 1, "bandwidth_bytes_per_second": 1}', '{"bf16_flops": 0, "fp32_flops": 1, "bandwidth_bytes_per_second": 1}']
)  # fmt: skip
def test_a_damaged_memory_is_measured_anew(cache: Path, text: str) -> None:
    measured_speeds("cpu")
    remembered(cache).write_text(text)
    assert measured_speeds("cpu").bf16_flops > 1e8


def test_this_machine_is_a_target_with_sources(cache: Path) -> None:
    target = detected_target("cpu")
    assert target.device == "cpu"
    assert target.memory_bytes > 1 << 28
    assert set(target.sources) == {
        "memory_bytes", "peak_flops", "products_flops", "loops_flops", "bandwidth_bytes_per_second",
    }  # fmt: skip


def test_time_that_others_have_the_cores_for_is_left_out() -> None:
    def work() -> None:
        time.sleep(0.05)  # as far as this process can tell, another one ran

    assert _best_seconds(work, "cpu") < 0.01


def test_doctor_shows_the_best_and_says_when_the_machine_is_busy(cache: Path) -> None:
    measured_speeds("cpu")
    remembered(cache).write_text(json.dumps(dataclasses.asdict(Speeds(1e18, 1.0, 1e18))))
    report = examine("cpu")
    assert report.facts["bf16_gflops"] == 1e9
    assert "of the best measured here" in " ".join(report.problems)
    assert report.facts["fp32_gflops_in_blocks"] > 1
