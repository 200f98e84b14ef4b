"""Operators of our own that Inductor's code calls: attention, loss, and large products.

They are in bf16, for processors with AVX-512, and run on the matrix unit of those that have one
(AMX), of which torch's libraries leave half unused. `compiler/inductor.py` puts them in
the place of torch's in the graphs it is given; graphs that people or other toolchains see hold
torch's operators only. Their C++ (`cpp/operators`) is linked into each kernel that calls them.
"""

import functools
import hashlib
import shutil
import sys
from pathlib import Path

from penstock.compiler.fingerprint import processor_features

SOURCES = Path(__file__).parent / "cpp" / "operators"
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
_UNIT = ("amx_tile", "amx_bf16")
COMPILER = "g++"
FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp",
    "-fPIC", "-fvisibility=hidden",
)  # fmt: skip
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
    return _has(_FEATURES) and all(map(shutil.which, (COMPILER, "ar")))


def takes_attention(compute: str, head_size: int, length: int) -> bool:
    """Whether attention without dropout over so many positions can be ours here."""
    return fits_attention(compute, head_size, length) and available()


def fits_attention(compute: str, head_size: int, length: int) -> bool:
    """Whether it can be where kernels can call our operators."""
    return compute == "bf16" and head_size % BLOCK == 0 and length % BLOCK == 0


@functools.cache
def source_hash() -> str:
    """SHA-256 over the operators' C++."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in (SOURCES.parent / "matrix_unit.hpp", *sorted(SOURCES.iterdir())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def settings() -> str | None:
    """What kernels depend on here, also where none can be built: the operators' sources, or None
    where none are called.
    """
    return source_hash() if _has(_FEATURES) else None
