"""A job on the hosts of a file: the command of each, shown or started over a remote shell.

`cli.py` calls it for `penstock launch` and for `--hosts FILE`. It must never import torch.
"""

import contextlib
import dataclasses
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from penstock.console import get_console
from penstock.errors import ConfigError, UserError
from penstock.parallel.environment import found_by

_PORT = 29500
_LINE = re.compile(r"(?P<name>[^\s:#]+)(?:\s*:\s*(?P<count>\d+)|\s+slots\s*=\s*(?P<slots>\d+))?")


@dataclasses.dataclass(frozen=True)
class Host:
    """One line of a host file."""

    name: str
    processes: int | None
    """None where the file does not say."""


def read_hosts(path: str | Path) -> list[Host]:
    """Hosts of a file: a name a line, NAME:COUNT or NAME slots=COUNT, # for what is not read.

    The first is where the processes meet. That is the form of Open MPI's and DeepSpeed's files,
    and with a colon MPICH's.

    Raises:
        ConfigError: no such file, a line that is none of these, a host twice, or none at all.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", where="--hosts") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or match["name"] in [host.name for host in hosts]:
            raise ConfigError(
                f"“{text}” is {'no host' if match is None else 'there twice'}",
                where=f"{path}, line {number}",
                do="write one host a line: NAME, NAME:PROCESSES or NAME slots=PROCESSES",
            )
        count = match["count"] or match["slots"]
        hosts.append(Host(match["name"], int(count) if count else None))
    if not hosts:
        raise ConfigError(f"{path} names no host", where="--hosts", do="write one host a line")
    return hosts


def host_keys(hosts: Sequence[Host], given: Sequence[str]) -> list[str]:
    """What the hosts say as keys of `launch`; those the user has given stay as they are.

    Raises:
        ConfigError: hosts with different numbers of processes.
    """
    counts = {host.processes for host in hosts}
    if len(counts) > 1 or 0 in counts:
        raise ConfigError(
            f"the hosts have {', '.join(str(host.processes) for host in hosts)} processes",
            where="--hosts",
            do="give all of them the same number, at least 1",
        )
    keys = {"launch.hosts": str(len(hosts))}
    if len(hosts) > 1:
        keys["launch.address"] = f"{hosts[0].name}:{_PORT}"
    if None not in counts:
        keys["launch.processes"] = str(hosts[0].processes)
    named = {word.partition("=")[0] for word in given}
    return [f"{key}={value}" for key, value in keys.items() if key not in named]


def host_commands(hosts: Sequence[Host], words: Sequence[str], shell: str) -> list[list[str]]:
    """The command that starts `penstock WORDS` on each host, in this folder there."""
    remote = f"cd {shlex.quote(str(Path.cwd()))} && exec " + shlex.join(
        [*found_by(), sys.executable, "-m", "penstock", *words]
    )
    return [[*shlex.split(shell), host.name, remote] for host in hosts]


def launch_on_hosts(path: str | Path, words: Sequence[str], *, shell: str, dry_run: bool) -> None:
    """Start a command on every host of a file, or only show the commands; waits for all.

    SIGTERM and Ctrl-C are passed on to all; what they say is shown with the host's name.

    Raises:
        ConfigError: the file is wrong.
        UserError: a host could not be reached, or its command failed.
    """
    hosts, console = read_hosts(path), get_console()
    commands = host_commands(hosts, [*words, *host_keys(hosts, words)], shell)
    if dry_run:
        for command in commands:
            console.write(shlex.join(command))
        return
    codes = _Fleet([host.name for host in hosts], commands).run()
    failed = {host.name: code for host, code in zip(hosts, codes, strict=True) if code}
    if failed:
        name, code = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(hosts)} hosts failed, {name} with exit code {code}",
            where="--hosts",
            do=f"see what it said; exit code 255 is {shlex.split(shell)[0]}'s own",
        )


class _Fleet:
    """Commands under way, one for each host."""

    def __init__(self, names: Sequence[str], commands: Sequence[Sequence[str]]) -> None:
        self._names, self._commands = names, commands
        self._processes: list[subprocess.Popen[str]] = []

    def run(self) -> list[int]:
        """Start all, relay what they say, wait; their exit codes."""
        before = {n: signal.signal(n, self._pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
        threads: list[threading.Thread] = []
        try:
            for name, command in zip(self._names, self._commands, strict=True):
                process = self._start(command)
                self._processes.append(process)
                threads.append(threading.Thread(target=_relay, args=(name, process)))
                threads[-1].start()
            return [process.wait() for process in self._processes]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in self._processes:
                if process.poll() is None:
                    process.terminate()
            for thread in threads:
                thread.join()

    @staticmethod
    def _start(command: Sequence[str]) -> subprocess.Popen[str]:
        try:
            return subprocess.Popen(  # noqa: S603 - a list of words, from the user's own file
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(
                f"{command[0]} cannot be started: {error.strerror}",
                where="launch.remote_shell",
                do="install it, or name another program that is called with a host and a command",
            ) from None

    def _pass_on(self, number: int, frame: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def _relay(name: str, process: subprocess.Popen[str]) -> None:
    """Show a host's lines as they come."""
    for line in process.stdout or ():
        get_console().info(f"{name}: {line.rstrip()}")
