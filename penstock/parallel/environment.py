"""Who started this process: torch's launchers, Slurm, or an MPI; which of how many it is.

`cli.py` asks before torch is loaded, `world.py` joins by it. It must never import torch.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from penstock.errors import ConfigError
from penstock.parallel.network import interface_of, own_address
from penstock.workers import end_with


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among those of a job."""

    rank: int = 0
    """0…size."""
    size: int = 1
    """Processes of the job, on all hosts."""
    local_rank: int = 0
    """0…local_size: which of its host's processes it is."""
    local_size: int = 1
    """Processes on this host."""
    address: str = "127.0.0.1"
    """Host of rank 0."""
    port: int = 29500

    @property
    def hosts(self) -> int:
        """Hosts of the job, as many processes on each."""
        return max(1, self.size // self.local_size)


CHILD_MARK = "PENSTOCK_LAUNCHED"
"""Variable with which Penstock's own launcher names a folder to the processes it starts."""
ORIGINS = "origins.json"
"""File there: where each setting came from, by its key."""
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}
"""Variables of each launcher: rank, size, rank on the host, processes on the host."""


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """This process's place; alone where nobody started several.

    Slurm sets its variables also for what runs once: only a step of several tasks counts.

    Raises:
        ConfigError: the variables contradict each other, or say nothing of the host of rank 0.
    """
    given = os.environ if environment is None else environment
    for launcher, names in _LAUNCHERS.items():
        rank, size, local_rank, local_size = names
        if rank not in given or size not in given:
            continue
        count = _number(given, size, launcher)
        if count < 2:
            return Place()
        place = Place(
            rank=_number(given, rank, launcher),
            size=count,
            local_rank=_number(given, local_rank, launcher, default=0),
            local_size=_number(given, local_size, launcher, default=count),
            address=_address(given, launcher),
            port=_number(given, "MASTER_PORT", launcher, default=Place.port),
        )
        if not (place.rank < place.size and place.local_rank < place.local_size):
            raise ConfigError(
                f"{launcher} says that this is process {place.rank} of {place.size}, "
                f"{place.local_rank} of {place.local_size} on its host",
                where=rank,
                do="start all processes with one launcher",
            )
        return place
    return Place()


def _number(given: Mapping[str, str], name: str, launcher: str, default: int | None = None) -> int:
    """A count from a variable; Slurm writes "4(x2)" for 4 on each of 2 hosts."""
    text = given.get(name, "" if default is None else str(default))
    match = re.match(r"\d+", text)
    if match is None:
        raise ConfigError(
            f"{name}={text} of {launcher} is not a number",
            where=name,
            do="start all processes with one launcher",
        )
    return int(match[0])


def _address(given: Mapping[str, str], launcher: str) -> str:
    """Host of rank 0: MASTER_ADDR, the first host of Slurm's list, or this one."""
    if given.get("MASTER_ADDR"):
        return given["MASTER_ADDR"]
    if launcher == "Slurm" and given.get("SLURM_NODELIST"):
        return _first_host(given["SLURM_NODELIST"])
    hosts = given.get("OMPI_MCA_num_nodes") or given.get("SLURM_NNODES") or "1"
    if hosts != "1":
        raise ConfigError(
            f"{launcher} started processes on {hosts} hosts, but not which has rank 0 is said",
            where="MASTER_ADDR",
            do="set MASTER_ADDR to that host's name for all processes",
        )
    return Place.address


def _first_host(hosts: str) -> str:
    """First of a Slurm host list: "gpu[03-07,9],login" is gpu03."""
    first = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?", hosts)
    if first is None:
        return hosts
    return first[1] + re.split(r"[-,]", first[2] or "")[0]


def use_interface_to(place: Place) -> None:
    """Have gloo and NCCL use the network interface to rank 0's host, unless the user chose one."""
    if place.hosts == 1:
        return
    address = own_address(place.address, place.port)
    interface = None if address is None else interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def tell_deepspeed(place: Place, device: str) -> None:
    """Leave DeepSpeed, before it is imported, what it asks the environment for."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Torch's launchers set it, mpirun and srun do not.
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))


def found_by() -> list[str]:
    """Words before a command with which another host finds this Penstock, where it is not installed
    but named by PYTHONPATH.
    """
    path = os.environ.get("PYTHONPATH")
    return ["env", f"PYTHONPATH={path}"] if path else []


def was_launched() -> bool:
    """Whether Penstock's own launcher started this process, and tells what came of it."""
    return CHILD_MARK in os.environ


def inherited_origins() -> dict[str, str] | None:
    """Where settings came from, as the launcher was told; None without one."""
    folder = os.environ.get(CHILD_MARK)
    return json.loads(Path(folder, ORIGINS).read_bytes()) if folder else None


def leave_error(message: str) -> bool:
    """Leave what went wrong for the launcher, which tells it once; whether that was possible.

    In the form of torch's elastic agent (torch/distributed/elastic/multiprocessing/errors).
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    extra = {"timestamp": str(int(time.time())), "py_callstack": ""}
    content = json.dumps({"message": {"message": message, "extraInfo": extra}})
    with contextlib.suppress(OSError, TypeError):
        Path(path or "").write_text(content, encoding="utf-8")
        return True
    return False


def end_with_launcher() -> None:
    """Have the kernel end this process when its launcher ends, however that ends."""
    if not was_launched():
        return
    launcher = os.getppid()
    if launcher == 1:
        sys.exit(1)  # It had ended before we asked.
    end_with(launcher)
