"""Programs in several processes under torchrun, each of which writes files of its own.

Lines that several processes write to one pipe can run into each other: nothing here reads such.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Said:
    """What one process wrote."""

    out: str
    err: str


def torchrun(
    program: str, argument: object, folder: Path, processes: int = 2, timeout: float = 400
) -> list[Said]:
    """Run the program in that many processes until all end well; what each said, by rank.

    `argument` goes as JSON into the file that the program finds as `sys.argv[1]`. Each process has
    one thread.
    """
    (folder / "argument.json").write_text(json.dumps(argument))
    (folder / "program.py").write_text(program)
    logs = folder / f"said-{len(list(folder.glob('said-*')))}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--redirects", "3", "--log-dir", str(logs)]
    done = subprocess.run(
        [*command, str(folder / "program.py"), str(folder / "argument.json")],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # DIR/JOB/attempt_0/RANK/stdout.log: torch/distributed/elastic/multiprocessing/api.py.
    folders = [next(logs.glob(f"*/attempt_0/{rank}")) for rank in range(processes)]
    said = [Said((f / "stdout.log").read_text(), (f / "stderr.log").read_text()) for f in folders]
    assert done.returncode == 0, "\n".join([done.stderr[-500:], *(s.err[-2000:] for s in said)])
    return said
