"""Preparation on a Ray cluster: the bytes of preparation here, also after the driver is killed."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.data.dataset import MANIFEST

CHILD = "import sys, json, penstock; penstock.prepare(**json.loads(sys.argv[1]))"


def settings(corpus: Path, dataset: Path, out: Path, engine: str) -> dict:
    return {
        "source": {"path": str(corpus)},
        "tokenizer": {"from": str(dataset)},
        "data": {"path": str(out), "sequence_length": 64},
        "prepare": {"engine": engine, "workers": 2, "shard_bytes": 20_000},
    }


def shards_done(out: Path) -> int:
    return len(list(out.glob(".prepare/*/shard-*/facts.json")))


@pytest.mark.slow
def test_a_killed_cluster_goes_on_to_the_bytes_made_here(
    corpus: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'penstock[ray]'")
    import penstock

    penstock.prepare(**settings(corpus, dataset_folder, tmp_path / "here", "local"))
    out = tmp_path / "cluster"
    arguments = json.dumps(settings(corpus, dataset_folder, out, "ray"))
    process = subprocess.Popen([sys.executable, "-c", CHILD, arguments])
    while process.poll() is None and not shards_done(out):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < shards_done(out)
    penstock.prepare(**settings(corpus, dataset_folder, out, "ray"))
    names = json.loads((tmp_path / "here" / MANIFEST).read_text())["files"]
    for name in [*names, MANIFEST]:
        assert (out / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


@contextlib.contextmanager
def head(folder: Path) -> Iterator[str]:
    """A cluster of one machine, as `ray start --head` leaves it; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false"]
    words += ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"]
    program = [sys.executable, "-m", "ray.scripts.scripts", *words, f"--temp-dir={folder}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(program, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()  # with --block it ends what it has started
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_cluster_elsewhere_makes_the_same_bytes(
    corpus: Path, dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'penstock[ray]'")
    import penstock

    penstock.prepare(**settings(corpus, dataset_folder, tmp_path / "here", "local"))
    words = [f"source.path={corpus}", f"tokenizer.from={dataset_folder}", "prepare.engine=ray"]
    words += ["prepare.shard_bytes=20000", "data.sequence_length=64"]
    # Paths of Ray's sockets must be short.
    out = tmp_path / "there"
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder,
        head(Path(folder)) as address,
    ):
        assert main(["prepare", *words, f"data.path={out}", f"ray.address={address}"]) == 0
        assert "Ray: 1 machines, 2 processors" in " ".join(capsys.readouterr().err.split())
    names = json.loads((tmp_path / "here" / MANIFEST).read_text())["files"]
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "Connection refused"), ("ray://localhost", "an address is HOST:PORT")],
)
def test_a_cluster_that_is_not_there_is_one_line(
    address: str,
    message: str,
    corpus: Path,
    dataset_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'penstock[ray]'")
    words = [f"source.path={corpus}", f"tokenizer.from={dataset_folder}", "prepare.engine=ray"]
    words += [f"ray.address={address}", f"data.path={tmp_path / 'd'}"]
    assert main(["prepare", *words]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"there is no Ray cluster at {address}" in err
    assert message in err


def test_without_ray_one_line_says_what_to_install(
    corpus: Path,
    dataset_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [f"source.path={corpus}", f"tokenizer.from={dataset_folder}", "prepare.engine=ray"]
    assert main(["prepare", *words, f"data.path={tmp_path / 'd'}"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "Ray is not installed (prepare.engine=ray): pip install 'penstock[ray]'" in err
