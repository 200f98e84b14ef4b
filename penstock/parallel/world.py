"""The processes that train one model together, and what they say to each other.

`train_run.py` joins; the train step, the trainer and the checkpoints get the `World`. Alone, every
method is a plain function of this process. It must never know about models.

Host values travel by gloo, tensors of a GPU by NCCL.
"""

import atexit
import contextlib
import datetime
import functools
import json
import secrets
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from penstock.console import get_console
from penstock.errors import ConfigError, UserError
from penstock.parallel.environment import Place, use_interface_to
from penstock.parallel.watch import Pace, Watchdog, absent

_LET_GO_SECONDS = 0.1


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
        self._watchdog: Watchdog | None = None
        self._pace = Pace(place.size)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the job leaves behind."""
        return self.rank == 0

    @property
    def token(self) -> str:
        """Equal in all processes of one start of the job, and in no other; known once joined."""
        return self._token

    @contextlib.contextmanager
    def joined(self, device: str, timeout_seconds: float, stacks: Path) -> Generator[None]:
        """Meet the peers, once in a process: a second job in it goes on with the same.

        Args:
            device: cpu or cuda; each process of a host takes the GPU of its place there.
            timeout_seconds: longest wait for a peer before the job is given up.
            stacks: folder for where each process stands when that is over.

        Raises:
            PeerLostError: inside, a peer ended or was silent for too long; every thread's stack
                is in a file then, which the message names.
        """
        if self.size == 1:
            yield
            return
        if not torch.distributed.is_initialized():
            self._meet(device, timeout_seconds)
        with Watchdog(stacks, self.rank, timeout_seconds) as self._watchdog:
            try:
                self._token = self._gather({"token": secrets.token_hex(4)})[0]["token"]
                yield
            except RuntimeError as error:
                if not _is_lost_peer(error):
                    raise
                raise self._lost(error, self._watchdog.dump()) from None

    def _lost(self, error: RuntimeError, file: str) -> PeerLostError:
        """What to say of a collective that failed: who was silent, where this process stood."""
        silent: list[int] = []
        if "timed out" in str(error).lower():
            # Whom it waited for, a collective does not say; those who wait can be asked.
            silent = absent(_store(), self.rank, self.size, self._token)
        who = f"rank {', '.join(map(str, silent))}" if silent else "another process"
        return PeerLostError(
            f"rank {self.rank} lost {who}: {_first_line(error)}; where its threads stood: {file}",
            where="launch.timeout_seconds" if silent else "launch",
            do="see what the first process that failed says; the same command goes on from "
            "the last checkpoint",
        )

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
            started = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            self._pace.waited += time.perf_counter() - started
        return tensor

    def end_step(self, stop: bool) -> bool:
        """Whether any process wants to stop after this step; one that is slow is named."""
        if self.size == 1:
            return stop
        if self._watchdog is not None:
            self._watchdog.rearm()
        told = torch.zeros(self.size + 1, dtype=torch.float64)
        told[-1], told[self.rank] = float(stop), self._pace.own_seconds()
        *seconds, stops = self.sum(told).tolist()
        slow = self._pace.straggler(seconds)
        if slow is not None and self.is_first:
            get_console().warning(slow)
        return stops > 0

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

    def united(self, value: dict[str, Any]) -> dict[str, Any]:
        """All processes' objects (JSON) as one, entry by entry; all must call it, with an object
        that is empty in all of them or in none.
        """
        if self.size == 1 or not value:
            return value
        return functools.reduce(_united, self._gather(value))

    def _gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
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


def _united(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both objects' entries; of two values that are no objects themselves, the first."""
    found = dict(one)
    for key, value in other.items():
        mine = found.setdefault(key, value)
        if isinstance(mine, dict) and isinstance(value, dict):
            found[key] = _united(mine, value)
    return found


def _needs_address() -> bool:
    """Whether no launcher of torch's gave a meeting place in the environment."""
    return not torch.distributed.is_torchelastic_launched()


def _store() -> Any:  # noqa: ANN401 - torch's own class, which it does not name publicly
    """Where processes leave each other notes outside collectives."""
    return torch.distributed.distributed_c10d._get_default_store()


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
    # Gloo's threads still let go of the last collective's tensors, which takes the interpreter: one
    # that is ending would take the process down ("terminate called without an active exception").
    time.sleep(_LET_GO_SECONDS)
    with contextlib.suppress(RuntimeError, AssertionError):
        torch.distributed.destroy_process_group()
