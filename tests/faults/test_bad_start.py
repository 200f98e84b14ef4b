"""Jobs that cannot start: one line from the first process, every process ends, none is left.

A plan for another number of processes is in `tests/parallel/test_replicas.py`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.checkpoint import list_checkpoints
from tests.parallel.test_replicas import job, start

CHILD = """
import json, os, sys, torch, penstock
from penstock.hardware.process import prepare_process
from penstock.errors import UserError
prepare_process()
rank = int(os.environ["RANK"])
cases = json.load(open(sys.argv[1]))
for name, jobs in cases.items():
    real = torch.__version__
    if name == "torch" and rank == 1:
        torch.__version__ = "2.99.0"
    try:
        penstock.train(**jobs[rank])
        said = "trained"
    except UserError as error:
        said = str(error)
    torch.__version__ = real
    print(json.dumps({"rank": rank, "case": name, "said": said}), flush=True)
"""


def test_processes_that_would_train_different_jobs_refuse(
    tiny_executable: Path, dropout_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    same = job(dataset_folder, tmp_path / "run")
    other = {**same, "optimizer": {"lr": 1e-4}}
    kernels = [
        {k: v for k, v in same.items() if k not in ("model", "precision", "compile")}
        | {"batch": {"size": 8}, "executable": str(path)}
        for path in (tiny_executable, dropout_executable)
    ]
    cases = {"configuration": [same, other], "executable": kernels, "torch": [same, same]}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "child.py"), str(tmp_path / "cases.json")],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 2 * len(cases)
    for name in cases:
        one, two = (record["said"] for record in said if record["case"] == name)
        assert one == two
        assert "the processes differ in their" in one
        assert "rank 1" in one
        assert name in one or name == "executable"
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


def refused(values: dict, folder: Path, *words: str) -> str:
    """The one line of a job that cannot start."""
    process = start(values, folder, "--processes", "1", *words)
    error = process.communicate(timeout=120)[1]
    assert process.returncode in (1, 2), error
    [line] = [text for text in error.splitlines() if text.startswith("penstock")]
    assert not Path(f"/proc/{process.pid}").exists()
    return line


@pytest.mark.slow
def test_a_port_that_is_taken_and_hosts_that_are_not_there(
    dataset_folder: Path, tmp_path: Path
) -> None:
    values = {**job(dataset_folder, tmp_path / "run"), "launch": {"timeout_seconds": 5}}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ("launch.hosts=2", f"launch.address={address}")
        assert "the hosts did not meet" in refused(values, tmp_path, *words)
    line = refused(values, tmp_path, "launch.hosts=2", "launch.address=no-such-host.invalid:29500")
    assert "no-such-host.invalid is not known" in line
    # A free port on this host, and the other host never comes.
    line = refused(values, tmp_path, "launch.hosts=2", f"launch.address={address}")
    assert "the hosts did not meet" in line
