"""Compile the operators of `compiler/operators.py` into what kernels are linked with.

Inductor's toolchain does in worker processes.
"""

import subprocess
import tempfile
from pathlib import Path

import torch

from penstock.compiler.operators import COMPILER, FLAGS, SOURCES, source_hash
from penstock.errors import ExecutableError
from penstock.files import atomic_write

LIBRARY = "penstock_operators"
"""By which a linker finds it."""


def build_library(workspace: Path) -> Path:
    """Compile the operators into an archive below `workspace`, once for all its kernels.

    Raises:
        ExecutableError: the compiler fails.
    """
    folder = workspace / f"operators-{source_hash()[:16]}"
    archive = folder / f"lib{LIBRARY}.a"
    if archive.exists():
        return archive
    folder.mkdir(mode=0o700, exist_ok=True)
    include = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made, packed = Path(scratch) / "operators.o", Path(scratch) / archive.name
        source = str(SOURCES / "operators.cpp")
        compiler = [COMPILER, *FLAGS, f"-I{include}", "-c", source, "-o", str(made)]
        for command in (compiler, ["ar", "rcs", str(packed), str(made)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's compiler on our source
            if done.returncode:
                raise ExecutableError(
                    f"{command[0]} does not compile our operators: "
                    f"{(done.stderr.strip().splitlines() or ['no message'])[0]}",
                    where="compile.toolchain",
                    do="or train with compile.mode=off",
                )
        atomic_write(archive, packed.read_bytes())  # others may make the same at the same time
    return archive
