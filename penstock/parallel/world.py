"""The processes that train one model together, and what they say to each other.

`train_run.py` joins; the train step, the trainer and the checkpoints get the `World`. Alone, every
method is a plain function of this process. It must never know about models.

Host values travel by gloo, tensors of a GPU by NCCL.
"""

import atexit
import contextlib
import datetime
import faulthandler
import json
import secrets
import sys
from collections.abc import Generator, Mapping

import torch
import torch.distributed
from torch import Tensor

from penstock.errors import ConfigError, UserError
from penstock.parallel.environment import Place, use_interface_to


class PeerLostError(UserError):
    """Another process of the job ended, or did not answer in time."""

    exit_code = 1


class World:
    """This process and its peers."""

    def __init__(self, place: Place) -> None:
        """Nobody is spoken to before `joined`."""
        self.place = place
        self.rank = place.rank
        self.size = place.size
        self._token = ""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the job leaves behind."""
        return self.rank == 0

    @property
    def token(self) -> str:
        """Equal in all processes of one start of the job, and in no other; known once joined."""
        return self._token

    @contextlib.contextmanager
    def joined(self, device: str, timeout_seconds: float) -> Generator[None]:
        """Meet the peers, once in a process: a second job in it goes on with the same.

        Args:
            device: cpu or cuda; each process of a host takes the GPU of its place there.
            timeout_seconds: longest wait for a peer before the job is given up.

        Raises:
            PeerLostError: inside, a peer ended or was silent for too long; every thread's stack
                is on standard error then.
        """
        if self.size == 1:
            yield
            return
        if not torch.distributed.is_initialized():
            self._meet(device, timeout_seconds)
        try:
            self._token = self._gather({"token": secrets.token_hex(4)})[0]["token"]
            yield
        except RuntimeError as error:
            if not _is_lost_peer(error):
                raise
            faulthandler.dump_traceback(sys.stderr)
            raise PeerLostError(
                f"rank {self.rank} lost another process: {_first_line(error)}",
                where="launch",
                do="see what the first process that failed says; the same command goes on from "
                "the last checkpoint",
            ) from None

    def _meet(self, device: str, timeout_seconds: float) -> None:
        """Make the process group; it lasts as long as the process."""
        place = self.place
        if device == "cuda":
            torch.cuda.set_device(place.local_rank)
        use_interface_to(place)
        try:
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                init_method=f"tcp://{place.address}:{place.port}" if _needs_address() else None,
                rank=self.rank,
                world_size=self.size,
                timeout=datetime.timedelta(seconds=timeout_seconds),
            )
        except (RuntimeError, ValueError) as error:
            raise PeerLostError(
                f"rank {self.rank} of {self.size} did not meet the others at "
                f"{place.address}:{place.port}: {_first_line(error)}",
                where="launch",
                do="check that address and port are free and reachable from every host",
            ) from None
        atexit.register(_part)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape, in place; the same bits everywhere."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag))).item())

    def require_same(self, values: Mapping[str, str]) -> None:
        """Refuse to go on where processes disagree.

        Raises:
            ConfigError: names what differs and in which processes, the same in all of them.
        """
        if self.size == 1:
            return
        every: list[dict[str, str]] = self._gather(dict(values))
        for name, expected in every[0].items():
            other = [rank for rank, found in enumerate(every) if found.get(name) != expected]
            if other:
                raise ConfigError(
                    f"the processes differ in their {name}: rank 0 has {expected}, "
                    f"rank {other[0]} {every[other[0]].get(name)} ({len(other)} differ)",
                    where="launch",
                    do="start every process with the same command, files and versions",
                )

    def _gather(self, value: dict[str, str]) -> list[dict[str, str]]:
        """Every process's value, by rank. As JSON in tensors: torch's own way unpickles."""
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        torch.distributed.all_gather(lengths, torch.tensor(len(content)))
        longest = int(max(lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(content)] = content
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        torch.distributed.all_gather(found, padded)
        return [
            json.loads(part[: int(n)].numpy().tobytes())
            for part, n in zip(found, lengths, strict=True)
        ]


def _needs_address() -> bool:
    """Whether no launcher of torch's gave a meeting place in the environment."""
    return not torch.distributed.is_torchelastic_launched()


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process, not of this one."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    signs = ("connection closed", "connection reset", "timed out", "broken pipe", "socket")
    return any(sign in text for sign in signs)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _part() -> None:
    """Leave the process group; a peer that is gone already is no reason to complain."""
    with contextlib.suppress(RuntimeError, AssertionError):
        torch.distributed.destroy_process_group()
