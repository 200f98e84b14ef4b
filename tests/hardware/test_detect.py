"""What this machine is: control groups, GPUs, cores; nothing of it needs torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.hardware.detect import (
    control_group_limit,
    free_memory_bytes,
    gpus,
    memory_bytes,
    parse_gpus,
    processor_flags,
    processor_name,
    usable_cores,
)


def group(folder: Path, text: str, name: str = "memory.max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "above", "limit"),
    [
        ("max", "max", None),
        ("2000", "max", 2000),
        ("max", "3000", 3000),
        ("2000", "1000", 1000),
        ("", "1000", 1000),
    ],
)
def test_the_tightest_control_group_above_counts(
    tmp_path: Path, own: str, above: str, limit: int | None
) -> None:
    group(tmp_path / "mount" / "user.slice", above + "\n")
    group(tmp_path / "mount" / "user.slice" / "job", own + "\n")
    (tmp_path / "cgroup").write_text("0::/user.slice/job\n")
    assert control_group_limit(tmp_path / "mount", tmp_path / "cgroup") == limit


def test_inside_a_container_the_mount_is_the_group(tmp_path: Path) -> None:
    group(tmp_path / "mount", "5000\n")
    (tmp_path / "cgroup").write_text("0::/docker/of/the/host\n")
    assert control_group_limit(tmp_path / "mount", tmp_path / "cgroup") == 5000


def test_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    group(tmp_path / "memory" / "job", "7000\n", "memory.limit_in_bytes")
    (tmp_path / "cgroup").write_text("9:cpu,cpuacct:/other\n4:memory:/job\n")
    assert control_group_limit(tmp_path, tmp_path / "cgroup") == 7000


def test_no_control_groups_no_limit(tmp_path: Path) -> None:
    assert control_group_limit(tmp_path / "nothing", tmp_path / "nowhere") is None


def test_gpus_are_read_from_the_drivers_lines() -> None:
    listing = "NVIDIA H200, 143771\nName, with comma, 24564\nNVIDIA A30, [N/A]\n\n"
    assert parse_gpus(listing) == (
        ("NVIDIA H200", 143771 << 20),
        ("Name, with comma", 24564 << 20),
    )


def test_without_a_driver_there_are_no_gpus(tmp_path: Path) -> None:
    code = "from penstock.hardware.detect import gpus; assert gpus() == ()"
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PATH": str(tmp_path)}, check=True
    )


def test_a_failing_driver_is_no_gpu(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    program.chmod(0o755)
    code = "from penstock.hardware.detect import gpus; assert gpus() == ()"
    env = {**os.environ, "PATH": f"{tmp_path}:/bin:/usr/bin"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_this_machine_is_described_without_torch() -> None:
    assert processor_name()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 << 28 < memory_bytes() <= physical
    assert all(flag == flag.strip() for flag in processor_flags())
    assert all(memory > 0 for _, memory in gpus())
    code = (
        "import sys, penstock.hardware.detect as d; d.memory_bytes(); d.gpus(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cores_are_those_this_process_may_run_on() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from penstock.hardware.detect import usable_cores; assert usable_cores() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_free_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    facts = tmp_path / "meminfo"
    facts.write_text("MemTotal:  100 kB\nMemFree: 5 kB\nMemAvailable:   42 kB\n")
    assert free_memory_bytes(facts) == 42 << 10
    facts.write_text("MemTotal:  100 kB\n")
    assert free_memory_bytes(facts) is None
    assert free_memory_bytes(tmp_path / "nowhere") is None
    free = free_memory_bytes()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
