"""A process that saves checkpoints when it is told to, for others to trace, kill and starve.

Torch is imported once; every command is carried out by a fork, which waits for a tracer first.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from penstock.errors import UserError
from penstock.saving import AsyncSaver
from tests.test_checkpoint import make_state


def wait_for_tracer() -> None:
    # A call that fails is the tracer's doing.
    with contextlib.suppress(OSError):
        while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
            time.sleep(0.001)
    time.sleep(0.02)


def save(folder: Path, step: int, traced: bool, careless: bool) -> None:
    if careless:
        os.fsync = lambda descriptor: None
    saver = AsyncSaver(folder, keep=1)
    state = make_state(step, size=200)
    if traced:
        wait_for_tracer()
    try:
        saver.save(state, wait=True)
    except UserError as error:
        (folder.parent / "said").write_text(str(error))
        os._exit(2)
    os._exit(0)


for line in sys.stdin:
    command = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        try:
            save(Path(command["folder"]), command["step"], command["traced"], command["careless"])
        except BaseException as error:
            (Path(command["folder"]).parent / "said").write_text(f"fault: {error!r}")
        os._exit(3)
    for number in (child, None):
        sys.stdout.write(f"{os.waitpid(child, 0)[1] if number is None else number}\n")
        sys.stdout.flush()
