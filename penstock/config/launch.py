"""The keys of the `launch` section: how many processes train together, and how they meet.

`config/schema.py` gathers it with the others, `parallel/launch.py` receives it. It must never
import torch.
"""

from pydantic import Field

from penstock.config.section import Section


class LaunchSection(Section):
    """Several processes as one job; not needed under torchrun, mpirun or srun."""

    processes: int = Field(default=1, ge=1)
    """Processes on this host, a device each; also `--processes N`."""
    hosts: int = Field(default=1, ge=1)
    """Hosts of the job; the same command is started on each, with as many processes."""
    address: str | None = None
    """HOST:PORT where the processes of several hosts meet, on one of the hosts."""
    remote_shell: str = Field(default="ssh -tt", min_length=1)
    """Program with which `launch` starts a command on another host: it is given the host's name and
    the command. With -tt a connection that ends also ends what it started."""
    restarts: int = Field(default=3, ge=0)
    """Times the job starts again, from its last checkpoint, after a process was lost."""
    timeout_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Longest wait for another process; one that is silent for longer counts as lost."""
