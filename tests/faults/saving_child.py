"""A process that saves checkpoints when it is told to, for others to trace, kill and starve.

Torch is imported once; every command is carried out by a fork, which waits for a tracer first.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import penstock
from penstock.compiler.executable import Executable, write_executable
from penstock.compiler.kernels import BuiltKernel, KernelSpec, RegionContract
from penstock.console import set_console
from penstock.errors import UserError
from penstock.saving import AsyncSaver
from tests.test_checkpoint import make_state


def wait_for_tracer() -> None:
    # A call that fails is the tracer's doing.
    with contextlib.suppress(OSError):
        while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
            time.sleep(0.001)
    time.sleep(0.02)


def checkpoint(folder: Path, step: int) -> Callable[[], object]:
    saver, state = AsyncSaver(folder, keep=1), make_state(step, size=200)
    return lambda: saver.save(state, wait=True)


def executable(file: Path, step: int) -> Callable[[], object]:
    """What compiling writes; nobody runs the code."""
    given = Executable.inspect(file.parents[1] / "given")
    name, entry = next(iter(given.manifest["kernels"].items()))
    kernel = BuiltKernel(
        KernelSpec.from_json(entry["spec"]),
        RegionContract.from_json(entry["contract"]),
        code=bytes([step]) * 5000,
        graph="{}",
        seconds=0.0,
        reused=False,
    )
    return lambda: write_executable(file, given.plan, {name: kernel}, given.toolchain)


def dataset(folder: Path, step: int) -> Callable[[], object]:
    set_console(quiet=True)
    return lambda: penstock.prepare(
        source={"path": str(folder.parents[1] / f"text-{step}.txt"), "documents": "line"},
        tokenizer={"train": True, "vocab_size": 270},
        data={"path": str(folder), "sequence_length": 16},
        prepare={"workers": 1},
    )


MAKERS = {"checkpoint": checkpoint, "executable": executable, "dataset": dataset}


def save(folder: Path, step: int, traced: bool, careless: bool, what: str) -> None:
    if careless:
        os.fsync = lambda descriptor: None
    make = MAKERS[what](folder, step)
    if traced:
        wait_for_tracer()
    try:
        make()
    except UserError as error:
        (folder.parent / "said").write_text(str(error))
        os._exit(2)
    os._exit(0)


# Torch looks at the processor before it first computes: not in a fork, where a tracer may be early.
make_state(0, size=200)
for line in sys.stdin:
    command = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        try:
            save(Path(command.pop("folder")), **command)
        except BaseException as error:
            sys.stderr.write(f"fault: {error!r}\n")
        os._exit(3)
    for number in (child, None):
        sys.stdout.write(f"{os.waitpid(child, 0)[1] if number is None else number}\n")
        sys.stdout.flush()
