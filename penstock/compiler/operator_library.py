"""Compile the operators of `compiler/operators.py` into what kernels are linked with.

Inductor's toolchain does in worker processes.
"""

import tempfile
from pathlib import Path

import torch

from penstock.compiler.cpp_compiler import run_compiler
from penstock.compiler.operators import COMPILER, FLAGS, SOURCES, source_hash
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
            run_compiler(command, what="our operators", do="train with compile.mode=off")
        atomic_write(archive, packed.read_bytes())  # others may make the same at the same time
    return archive
