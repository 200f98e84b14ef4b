"""Toolchains: the ones in the tree, one installed beside it, none at all, and several at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import penstock
from penstock.compiler.executable import Executable
from penstock.compiler.toolchains import find_toolchain, toolchain_names
from penstock.errors import ConfigError, ExecutableError

PACKAGE = '''
"""A toolchain that packs graphs, and writes down each build."""
import os, time, zlib
from penstock.compiler.portable import read_graph, write_graph

class Packed:
    def problem(self):
        return None
    def settings(self):
        return {"version": 1}
    def build(self, region, options):
        with open(os.environ["PACKED_LOG"], "a") as log:
            log.write(region.name + "\\n")
        time.sleep(float(os.environ.get("PACKED_SECONDS", "0")))
        return zlib.compress(write_graph(region.module).encode())
    def load(self, name, code):
        module = read_graph(zlib.decompress(code))
        return lambda inputs: module(*inputs)

class Lacking:
    pass
'''
ENTRY_POINTS = """[penstock.toolchains]
packed = packed_toolchain:Packed
lacking = packed_toolchain:Lacking
gone = packed_toolchain:Gone
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package, installed as pip would lay it out."""
    folder = tmp_path / "site"
    (folder / "packed_toolchain-1.0.dist-info").mkdir(parents=True)
    (folder / "packed_toolchain.py").write_text(PACKAGE)
    metadata = folder / "packed_toolchain-1.0.dist-info"
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: packed\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PACKED_LOG", str(tmp_path / "log"))
    return folder


def arguments(tmp_path: Path, toolchain: str) -> dict:
    return {
        "model": {"preset": "gpt2-tiny", "layers": 1},
        "batch": {"micro": 4},
        "data": {"sequence_length": 64},
        "precision": {"compute": "fp32"},
        "compile": {"toolchain": toolchain, "cache": str(tmp_path / "cache"), "workers": 2},
        "executable": str(tmp_path / f"{toolchain}.penstock"),
    }


def trained_loss(executable: Path, dataset: Path, run: Path) -> float:
    summary = penstock.train(
        executable=executable,
        data={"path": dataset},
        run=run,
        train={"steps": 2, "report": False, "tensorboard": False},
    )
    return summary.values["loss"]["final"]


@pytest.mark.parametrize("toolchain", ["eager", "packed"])
def test_each_toolchain_trains_to_the_same_loss(
    toolchain: str, package: Path, tmp_path: Path, dataset_folder: Path, tiny_executable: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert {"eager", "inductor", "packed"} <= set(toolchain_names())
    settings = arguments(tmp_path, toolchain)
    settings["model"] = {"preset": "gpt2-tiny", "vocab_size": 512}
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")  # neither needs a C++ compiler
        made = penstock.compile(**settings)
    assert made.toolchain == toolchain
    losses = [
        trained_loss(path, dataset_folder, tmp_path / name)
        for name, path in (("theirs", made.path), ("inductor", tiny_executable))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if toolchain == "packed":
        assert len((tmp_path / "log").read_text().split()) == 6
        assert penstock.compile(**settings).reused
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="there is no toolchain packed"):
            Executable.open(made.path)


def test_what_is_no_toolchain_is_refused(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no toolchain inducter.*did you mean inductor"):
        penstock.compile(**arguments(tmp_path, "inducter"))
    with pytest.raises(ConfigError, match="is not a toolchain: it lacks methods"):
        find_toolchain("lacking")
    with pytest.raises(ConfigError, match="toolchain gone does not load"):
        find_toolchain("gone")


def test_for_another_machine_the_file_holds_graphs_and_says_so(
    tmp_path: Path, dataset_folder: Path
) -> None:
    settings = arguments(tmp_path, "inductor")
    made = penstock.compile(**settings, plan={"target": "h100"})
    assert made.toolchain == "none"
    members = Executable.inspect(made.path).members
    assert {name.split("/")[0] for name in members} == {"graphs", "plan.json"}
    assert json.loads(members["graphs/block_forward.json"])["nodes"]
    with pytest.raises(ExecutableError, match="holds the graphs of its regions, no machine code"):
        penstock.train(
            executable=made.path, data={"path": dataset_folder}, run=tmp_path / "run",
            train={"steps": 1},
        )  # fmt: skip


def compile_apart(settings: dict, package: Path, **environment: str) -> subprocess.Popen:
    code = "import json, sys, penstock; penstock.compile(json.loads(sys.argv[1]))"
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_two_compiles_at_once_do_the_work_once(package: Path, tmp_path: Path) -> None:
    settings = arguments(tmp_path, "packed")
    both = [
        compile_apart({**settings, "executable": str(tmp_path / name)}, package, PACKED_SECONDS="2")
        for name in ("a.penstock", "b.penstock")
    ]
    for process in both:
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error.decode()
    built = (tmp_path / "log").read_text().split()
    assert len(built) == len(set(built)) == 6
    assert (tmp_path / "a.penstock").read_bytes() == (tmp_path / "b.penstock").read_bytes()


def test_a_killed_compile_leaves_nothing_behind_that_counts(package: Path, tmp_path: Path) -> None:
    settings = arguments(tmp_path, "packed")
    process = compile_apart(settings, package, PACKED_SECONDS="60")
    deadline = time.monotonic() + 100
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "packed.penstock").exists()
    assert not penstock.compile(**settings).reused
    Executable.open(tmp_path / "packed.penstock").kernels()
