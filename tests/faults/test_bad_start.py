"""Jobs that cannot start: one line from the first process, every process ends, none is left.

A plan for another number of processes is in `tests/parallel/test_replicas.py`.
"""

import json
import socket
from pathlib import Path

import pytest

import penstock
from penstock.checkpoint import list_checkpoints
from tests.parallel.test_replicas import job, start
from tests.processes import torchrun

CHILD = """
import json, os, sys, torch, penstock
from penstock.hardware.process import prepare_process
from penstock.errors import UserError
prepare_process()
rank = int(os.environ["RANK"])
found = {}
for name, jobs in json.load(open(sys.argv[1])).items():
    real = torch.__version__
    if name == "torch" and rank == 1:
        torch.__version__ = "2.99.0"
    try:
        penstock.train(**jobs[rank])
        found[name] = "trained"
    except UserError as error:
        found[name] = str(error)
    torch.__version__ = real
print(json.dumps(found))
"""


def test_processes_that_would_train_different_jobs_or_go_on_from_another_refuse(
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
    # And a run folder with the checkpoint of another model, read whole and by parts of blocks.
    penstock.train(**job(dataset_folder, tmp_path / "other", train={"steps": 4}))
    model = {"preset": "gpt2-tiny", "hidden_size": 32, "heads": 2}
    wrong = {**job(dataset_folder, tmp_path / "other"), "model": model}
    models = {"whole": [wrong] * 2, "parts": [{**wrong, "plan": {"tensor": 2}}] * 2}
    said = [json.loads(rank.out) for rank in torchrun(CHILD, {**cases, **models}, tmp_path)]
    for name in models:
        one, two = (cases_of_rank[name] for cases_of_rank in said)
        assert one == two
        assert "another architecture: " in one
        assert "hidden_size 64, here 32; heads 4, here 2" in one
        assert "layers" not in one
    for name in cases:
        one, two = (cases_of_rank[name] for cases_of_rank in said)
        assert one == two
        assert "the processes differ in their" in one
        assert "rank 1" in one
        assert name in one or name == "executable"
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


def refused(values: dict, folder: Path, *words: str) -> str:
    """The one line of a job that cannot start."""
    process = start(values, folder, "--quiet", "--processes", "1", *words)
    error = process.communicate(timeout=120)[1]
    assert process.returncode in (1, 2), error
    [line] = error.splitlines()
    assert line.startswith("penstock: ")
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
    # An address that no host has (RFC 5737): nothing answers, or there is no route.
    line = refused(values, tmp_path, "launch.hosts=2", "launch.address=192.0.2.1:29500")
    assert "the hosts did not meet at 192.0.2.1:29500 in 5 s" in line
    # A free port on this host, and the other host never comes.
    line = refused(values, tmp_path, "launch.hosts=2", f"launch.address={address}")
    assert "the hosts did not meet" in line
