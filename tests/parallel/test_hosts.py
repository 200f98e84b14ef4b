"""Two hosts: network namespaces joined by a cable, with nothing else in common but the disk."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.parallel.network import interface_of, own_address, wait_for_port
from penstock.training.metrics import read_metrics

ADDRESSES = ("192.0.2.1", "192.0.2.2")
"""Of TEST-NET-1 (RFC 5737), which no real host has."""


def test_the_way_to_this_host_is_its_loopback() -> None:
    assert own_address("127.0.0.1", 9) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
    assert own_address("no-such-host.invalid", 9) is None


def test_a_port_is_waited_for_and_why_it_does_not_answer_is_known() -> None:
    with socket.socket() as later:
        later.bind(("127.0.0.1", 0))
        port = later.getsockname()[1]
        assert wait_for_port("127.0.0.1", port, 0.2) == "Connection refused"
        threading.Timer(0.7, later.listen).start()
        assert wait_for_port("127.0.0.1", port, 20) is None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    names = (f"penstock-a-{os.getpid()}", f"penstock-b-{os.getpid()}")
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need the ip program and root")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", names[1])
        end, other = f"va{os.getpid()}", f"vb{os.getpid()}"
        ip("link", "add", end, "netns", names[0], "type", "veth", "peer", other, "netns", names[1])
        for name, card, address in zip(names, (end, other), ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
            ip("-n", name, "link", "set", card, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_what_one_does(
    hosts: tuple[str, str], dataset_folder: Path, tmp_path: Path
) -> None:
    def values(run: Path) -> dict:
        return {
            "model": {"preset": "gpt2-tiny"},
            "data": {"path": str(dataset_folder), "sequence_length": 64},
            "batch": {"micro": 2, "size": 8},
            "precision": {"compute": "fp32"},
            "compile": {"mode": "off"},
            "train": {"steps": 8, "tensorboard": False, "report": False},
            "plan": {"shard": "weights"},
            "run": str(run),
        }

    def start(prefix: list[str], run: Path, *words: str) -> subprocess.Popen:
        config = tmp_path / f"{run.name}.yaml"
        config.write_text(json.dumps(values(run)))
        command = [*prefix, sys.executable, "-m", "penstock", "train", "--config", str(config)]
        return subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True)

    words = ("launch.hosts=2", f"launch.address={ADDRESSES[0]}:29511")
    both = [
        start(["ip", "netns", "exec", host], tmp_path / "two", *words, "--processes", "1")
        for host in hosts
    ]
    for process in both:
        error = process.communicate(timeout=200)[1]
        assert process.returncode == 0, error
    one = start([], tmp_path / "one")
    assert one.wait(timeout=300) == 0
    found, expected = (
        [r["loss"] for r in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in r]
        for run in ("two", "one")
    )
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=1e-5)
