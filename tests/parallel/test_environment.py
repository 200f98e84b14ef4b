"""Which process of how many this one is, by what launchers set."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.parallel.environment import Place, find_place
from tests.parallel.test_replicas import job


def test_alone_where_nobody_says_otherwise() -> None:
    assert find_place({}) == Place()
    # Slurm sets its variables for a batch script too, which runs once.
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}).size == 1


def test_torchrun() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    given |= {"MASTER_ADDR": "node3", "MASTER_PORT": "12345"}
    assert find_place(given) == Place(5, 8, 1, 4, "node3", 12345)
    assert find_place(given).hosts == 2


def test_open_mpi_and_mpich_on_one_host() -> None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    values = ("3", "4", "3", "4")
    given = {f"OMPI_COMM_WORLD_{name}": v for name, v in zip(names, values, strict=True)}
    assert find_place(given) == Place(3, 4, 3, 4)
    given = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert find_place(given) == Place(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-07,9],login", "gpu03"), ("a1,a2", "a1"), ("rack[2,5-6]", "rack2"), ("one", "one")],
)
def test_slurm_meets_on_its_first_host(nodes: str, first: str) -> None:
    given = {"SLURM_PROCID": "6", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2"}
    given |= {"SLURM_NTASKS_PER_NODE": "4(x2)", "SLURM_NODELIST": nodes, "SLURM_NNODES": "2"}
    assert find_place(given) == Place(6, 8, 2, 4, first, 29500)


def test_several_hosts_of_open_mpi_need_an_address() -> None:
    given = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_num_nodes": "2"}
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        find_place(given)
    assert find_place({**given, "MASTER_ADDR": "head"}).address == "head"


@pytest.mark.parametrize("rank", ["4", "x", ""])
def test_contradictions_are_refused(rank: str) -> None:
    with pytest.raises(ConfigError, match="RANK"):
        find_place({"RANK": rank, "WORLD_SIZE": "4"})


SET_BY = {
    "srun": lambda rank: {
        "SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": rank,
        "SLURM_NTASKS_PER_NODE": 2, "SLURM_NODELIST": "localhost", "SLURM_NNODES": 1,
    },
    "mpirun": lambda rank: {
        "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2,
        "OMPI_COMM_WORLD_LOCAL_RANK": rank, "OMPI_COMM_WORLD_LOCAL_SIZE": 2,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", SET_BY)
def test_processes_that_only_have_their_launchers_variables_train_together(
    launcher: str, dataset_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(job(dataset_folder, tmp_path / "run", train={"steps": 4})))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "penstock", "train", "--config", str(file)]
    more = {"OMP_NUM_THREADS": 1, "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **{k: str(v) for k, v in {**more, **SET_BY[launcher](rank)}.items()},
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    assert summary["plan"]["replicas"] == 2
    assert summary["steps"] == 4
