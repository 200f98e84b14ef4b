"""Memory, file descriptors, permissions and room that run out: one line, and nothing lost.

Full disks under a whole run are in `tests/end_to_end/test_resume.py`, under a save in
`tests/test_checkpoint.py` and `test_crash_points.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.checkpoint import list_checkpoints, load_checkpoint
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import job

CHILD = """
import contextlib, io, json, os, resource, sys
import penstock.cli, torch
from pathlib import Path

def train(job, name, **limits):
    Path("job.yaml").write_text(json.dumps(job))
    before = {}
    for limit, value in limits.items():
        which = getattr(resource, limit)
        before[which] = resource.getrlimit(which)
        resource.setrlimit(which, (value, before[which][1]))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = penstock.cli.main(["train", "--config", "job.yaml", "--quiet", *sys.argv[2:]])
    for which, value in before.items():
        resource.setrlimit(which, value)
    print(json.dumps({"name": name, "code": code, "said": said.getvalue()}), flush=True)

first, whole = json.load(open(sys.argv[1]))
train(first, "first")
files = len(os.listdir("/proc/self/fd"))
train(whole, "descriptors", RLIMIT_NOFILE=files)
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
large = {**whole, "run": whole["run"] + "-large", "model": {"preset": "gpt2"}}
train(large, "memory", RLIMIT_AS=used + (256 << 20))
train(whole, "mended")
"""


def test_a_limit_is_one_line_and_training_goes_on_when_it_is_lifted(
    dataset_folder: Path, tmp_path: Path
) -> None:
    first = job(dataset_folder, tmp_path / "run", train={"steps": 4})
    whole = job(dataset_folder, tmp_path / "run", train={"steps": 6})
    (tmp_path / "jobs.json").write_text(json.dumps([first, whole]))
    command = [sys.executable, "-c", CHILD, "jobs.json"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = {r["name"]: r for r in map(json.loads, done.stdout.splitlines())}
    assert said["first"]["code"] == said["mended"]["code"] == 0
    for name, expected in (("descriptors", "open files"), ("memory", "memory")):
        [line] = said[name]["said"].splitlines()
        assert said[name]["code"] == 2, line
        assert expected in line
        assert "internal fault" not in line
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r] == [
        *range(1, 7)
    ]
    assert load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]).step == 6


def test_a_folder_on_a_read_only_disk_is_one_line(dataset_folder: Path, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    make = ["mount", "-t", "tmpfs", "-o", "size=4m,ro", "tmpfs", str(mount)]
    if subprocess.run(make, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    try:
        (tmp_path / "job.json").write_text(json.dumps(job(dataset_folder, mount / "run")))
        command = [
            sys.executable,
            "-m",
            "penstock",
            "train",
            "--config",
            str(tmp_path / "job.json"),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
        assert done.returncode == 2
        [line] = [text for text in done.stderr.splitlines() if text.startswith("penstock")]
        assert "Read-only file system" in line
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)
