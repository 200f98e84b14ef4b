"""Host files: the command of each host, and what is wrong with a file."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.errors import ConfigError
from penstock.parallel.hosts import Host, host_keys, read_hosts
from tests.test_cli import fails


def test_the_forms_of_open_mpi_mpich_and_deepspeed_are_read(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# the cluster\nnode1 slots=8\n\nnode2:8  # the other\n")
    assert read_hosts(file) == [Host("node1", 8), Host("node2", 8)]
    file.write_text("node1\n10.0.0.2\n")
    assert read_hosts(file) == [Host("node1", None), Host("10.0.0.2", None)]
    assert host_keys(read_hosts(file), []) == ["launch.hosts=2", "launch.address=node1:29500"]
    given = ["launch.address=node2:1234"]
    assert host_keys(read_hosts(file), given) == ["launch.hosts=2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no host"),
        ("a b c", "“a b c” is no host"),
        ("a\na", "line 2"),
        ("a:0\nb:0", "0, 0 processes"),
        ("a:4\nb:8", "4, 8 processes"),
    ],
)
def test_a_wrong_file_is_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text(content)
    line = fails(capsys, "launch", "--hosts", str(tmp_path / "hosts"), "--dry-run", "train")
    assert message in line


def test_a_dry_run_prints_commands_that_a_shell_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("node1:4\nnode2:4\n")
    keys = ["run=my run", "data.path=D", "launch.remote_shell=ssh -p 22"]
    assert main(["launch", "--hosts", str(tmp_path / "hosts"), "--dry-run", "train", *keys]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in lines] == [["ssh", "-p", "22", f"node{n}"] for n in (1, 2)]
    for line in lines:
        words = shlex.split(line[4])
        assert words[:2] == ["cd", str(Path.cwd())]
        assert words[words.index("-m") - 1] == sys.executable
        assert "run=my run" in words
        assert "launch.address=node1:29500" in words
        assert "launch.processes=4" in words


def test_only_training_is_launched(capsys: pytest.CaptureFixture[str]) -> None:
    assert "launch starts training" in fails(capsys, "launch", "--hosts", "x", "plan")
    assert "launch starts training" in fails(capsys, "launch", "train")


def test_hosts_that_fail_are_named_and_nobody_is_left(tmp_path: Path) -> None:
    """A remote shell that runs commands here: what a network does is not under test."""
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\necho "on $1"\n[ "$1" = node1 ] || exit 7\nsleep 0.2\n')
    shell.chmod(0o755)
    (tmp_path / "hosts").write_text("node1\nnode2\n")
    command = [sys.executable, "-m", "penstock", "launch", "--hosts", str(tmp_path / "hosts")]
    done = subprocess.run(
        [*command, "train", f"launch.remote_shell={shell}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "node1: on node1" in done.stderr
    assert "1 of 2 hosts failed, node2 with exit code 7" in done.stderr


def test_a_remote_shell_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("node1\n")
    words = ["train", "launch.remote_shell=/no/such/shell"]
    line = fails(capsys, "launch", "--hosts", str(tmp_path / "hosts"), *words)
    assert "launch.remote_shell" in line


def test_an_unreadable_file_is_named() -> None:
    with pytest.raises(ConfigError, match="/no/hosts cannot be read"):
        read_hosts("/no/hosts")
