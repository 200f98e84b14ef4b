"""Operators of our own that Inductor's code calls: attention, loss, and weights' gradients.

They are in bf16, for processors with AVX-512, and run on the matrix unit of those that have one
(AMX), of which torch's libraries leave half unused. `compiler/inductor.py` puts them in
the place of torch's in the graphs it is given; graphs that people or other toolchains see hold
torch's operators only. Their C++ (`cpp/operators`) is linked into each kernel that calls them.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

from penstock.compiler.fingerprint import processor_features
from penstock.errors import ExecutableError

_SOURCES = Path(__file__).parent / "cpp" / "operators"
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
_UNIT = ("amx_tile", "amx_bf16")
_COMPILER = "g++"
_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp",
    "-fPIC", "-fvisibility=hidden",
)  # fmt: skip
_LIBRARY = "penstock_operators"
BLOCK = 32
"""Of these, rows and columns must be a multiple."""


def has_unit() -> bool:
    """Whether this machine has a matrix unit, where products of our own pay."""
    return _has((*_FEATURES, *_UNIT))


def _has(features: tuple[str, ...]) -> bool:
    known = processor_features()
    return sys.platform == "linux" and all(name in known for name in features)


def available() -> bool:
    """Whether kernels that are built here can call them."""
    return _has(_FEATURES) and all(map(shutil.which, (_COMPILER, "ar")))


def takes_attention(compute: str, head_size: int, length: int) -> bool:
    """Whether attention without dropout over so many positions can be ours here."""
    return fits_attention(compute, head_size, length) and available()


def fits_attention(compute: str, head_size: int, length: int) -> bool:
    """Whether it can be where kernels can call our operators."""
    return compute == "bf16" and head_size % BLOCK == 0 and length % BLOCK == 0


@functools.cache
def source_hash() -> str:
    """SHA-256 over the operators' C++."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in (_SOURCES.parent / "matrix_unit.hpp", *sorted(_SOURCES.iterdir())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def settings() -> str | None:
    """What kernels depend on here, also where none can be built: the operators' sources, or None
    where none are called.
    """
    return source_hash() if _has(_FEATURES) else None


def build_library(workspace: Path) -> Path:
    """Compile the operators into an archive below `workspace`, once for all its kernels.

    Raises:
        ExecutableError: the compiler fails.
    """
    import torch  # noqa: PLC0415 - only worker processes build

    folder = workspace / f"operators-{source_hash()[:16]}"
    archive = folder / f"lib{_LIBRARY}.a"
    if archive.exists():
        return archive
    folder.mkdir(mode=0o700, exist_ok=True)
    include = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made, packed = Path(scratch) / "operators.o", Path(scratch) / archive.name
        source = str(_SOURCES / "operators.cpp")
        compiler = [_COMPILER, *_FLAGS, f"-I{include}", "-c", source, "-o", str(made)]
        for command in (compiler, ["ar", "rcs", str(packed), str(made)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's compiler on our source
            if done.returncode:
                raise ExecutableError(
                    f"{command[0]} does not compile our operators: "
                    f"{(done.stderr.strip().splitlines() or ['no message'])[0]}",
                    where="compile.toolchain",
                    do="or train with compile.mode=off",
                )
        packed.replace(archive)  # others may make the same at the same time
    return archive


@contextlib.contextmanager
def linked(archive: Path) -> Generator[list[str]]:
    """Have the linker find the archive inside; the names to link."""
    before = os.environ.get("LIBRARY_PATH")
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(archive.parent), before)))
    try:
        yield [_LIBRARY]
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before
