"""Start one command in several processes, and again when one of them is lost.

`cli.py` and `api.py` call `launch`. Processes are watched by torch's elastic agent: when one ends,
the others are ended too. It must never know what the command does.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from penstock.config.launch import LaunchSection
from penstock.config.schema import Config
from penstock.console import get_console
from penstock.errors import ConfigError, UserError
from penstock.parallel.environment import CHILD_MARK, ORIGINS
from penstock.parallel.network import is_this_host, own_address, wait_for_port

_GRACE_SECONDS = 30
"""From SIGTERM to SIGKILL: what preemptible machines give."""
_MISTAKE = UserError.exit_code
_GOES_ON = "the same command goes on from the last checkpoint"


class LaunchError(UserError):
    """A job of several processes ended without being done."""

    exit_code = 1


def launch(
    words: Sequence[str], section: LaunchSection, folder: str, again: str = _GOES_ON
) -> bool:
    """Run `penstock WORDS` in the section's processes until all are done, or told to stop; whether
    they are done.

    `folder` is told to the processes: what they inherit besides the words lies there. `again`: what
    the same command does after it was stopped.

    Raises:
        ConfigError: several hosts without an address to meet at.
        LaunchError: the hosts did not find each other.
        UserError: what the first process that failed says, where it is the user's to mend.
        LaunchError: a process was lost, more often than the job may start again.
    """
    command = [sys.executable, "-m", "penstock", *words]
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for attempt in range(section.restarts + 1):
        try:
            with _environment(section, folder), tempfile.TemporaryDirectory() as logs:
                elastic_launch(_config(section, attempt, logs), command[0])(*command[1:])
            return True
        except SignalException as stop:
            name = signal.Signals(stop.sigval).name
            get_console().warning(f"{name}: stopped; {again}")
            return False
        except RendezvousError as error:
            reason = " ".join(str(error).split()) or "not all came in time"
            raise _did_not_meet(section, reason) from None
        except ChildFailedError as error:
            failure = _cause(error.failures)
            if failure.exitcode == _MISTAKE:
                raise UserError(_said(failure)) from None
            if attempt == section.restarts:
                raise LaunchError(
                    f"the job was given up after {section.restarts} restarts: {_said(failure)}",
                    where="launch.restarts",
                    do=f"mend that; {again}",
                ) from None
            get_console().warning(
                f"{_said(failure)}: all start again ({attempt + 1} of {section.restarts})"
            )
    return False


def _did_not_meet(section: LaunchSection, reason: str) -> LaunchError:
    return LaunchError(
        f"the hosts did not meet at {section.address} in {section.timeout_seconds:g} s: {reason}",
        where="launch.address",
        do="start the same command on every host; the port must be free on the first, and open",
    )


def run_in_processes(
    verb: str, config: Config, origins: Mapping[str, str], again: str = _GOES_ON
) -> bool:
    """`penstock VERB` in several processes, with this config and where its settings came from;
    whether they are done. For the rest see `launch`.
    """
    # Only what was set: the rest follows an executable.
    values = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    words = ["--quiet"] if get_console().quiet else []
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        file = Path(folder, "config.yaml")
        file.write_text(json.dumps(values), encoding="utf-8")
        Path(folder, ORIGINS).write_text(json.dumps(dict(origins)), encoding="utf-8")
        words = [verb, "--config", str(file), *words]
        return launch(words, config.launch, folder, again)


@contextlib.contextmanager
def _environment(section: LaunchSection, folder: str) -> Generator[None]:
    """What the processes inherit: cores divided among them, and who started them."""
    cores = len(os.sched_getaffinity(0))
    added = {
        CHILD_MARK: folder,
        "OMP_NUM_THREADS": os.environ.get(
            "OMP_NUM_THREADS", str(max(1, cores // section.processes))
        ),
    }
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _config(section: LaunchSection, attempt: int, logs: str) -> LaunchConfig:
    """One start of all processes; hosts agree on which attempt it is by its name.

    Waits for the first host to be there: the others know nothing to do without it.
    """
    if section.hosts > 1 and section.address is None:
        raise ConfigError(
            f"launch.hosts={section.hosts} need a place to meet",
            where="launch.address",
            do="set launch.address=HOST:PORT, one of the hosts and a free port, on all of them",
        )
    meeting = None if section.address is None else _meeting_place(section.address)
    seconds = max(1, round(section.timeout_seconds))
    settings: dict[str, Any] = {"join_timeout": seconds, "read_timeout": seconds}
    if meeting is not None:
        settings["is_host"] = is_this_host(*meeting)
        reason = None if settings["is_host"] else wait_for_port(*meeting, section.timeout_seconds)
        if reason is not None:
            raise _did_not_meet(section, reason)
    return LaunchConfig(
        min_nodes=section.hosts,
        max_nodes=section.hosts,
        nproc_per_node=section.processes,
        run_id=f"penstock-{attempt}" if section.hosts > 1 else f"penstock-{os.getpid()}-{attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint=section.address or "localhost:0",
        rdzv_configs=settings,
        local_addr="localhost" if meeting is None else own_address(*meeting),
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        shutdown_timeout=_GRACE_SECONDS,
    )


def _meeting_place(address: str) -> tuple[str, int]:
    """Host and port, checked for a way there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"{address} is not HOST:PORT",
            where="launch.address",
            do="name one of the hosts and a free port, such as node1:29500",
        )
    if own_address(host, int(port)) is None:
        raise ConfigError(
            f"{host} is not known, or there is no way to it",
            where="launch.address",
            do="check the name, or use an address",
        )
    return host, int(port)


def _cause(failures: dict[int, ProcessFailure]) -> ProcessFailure:
    """The failure that explains the others: a mistake, who names a silent process (which is then
    killed), a signal, what came first.
    """

    def order(failure: ProcessFailure) -> tuple[bool, bool, bool, int]:
        names_silent = "(launch.timeout_seconds)" in _said(failure)
        mistake = failure.exitcode == _MISTAKE
        return not mistake, not names_silent, failure.exitcode >= 0, failure.timestamp

    return min(failures.values(), key=order)


def _said(failure: ProcessFailure) -> str:
    """What a process left as its error, or how it ended."""
    data = failure.error_file_data
    if isinstance(data.get("message"), dict):
        return str(data["message"].get("message"))
    if failure.exitcode < 0:
        how = f"was ended by {signal.Signals(-failure.exitcode).name}"
    else:
        how = f"ended with exit code {failure.exitcode}"
    return f"process {failure.local_rank} of this host {how}"
