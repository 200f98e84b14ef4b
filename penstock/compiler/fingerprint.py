"""What machine code depends on besides shapes: sources, torch, compiler settings, processor.

The kernel cache keys on it, the executable's manifest records it, and opening an executable
compares it field by field. Computed without importing torch.
"""

import functools
import hashlib
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import penstock.compiler
import penstock.models
from penstock.compiler.toolchains import PORTABLE, find_toolchain

_SOURCES = (
    (
        penstock.models,
        (
            "transformer.py",
            "attention.py",
            "blockwise.py",
            "embedding.py",
            "head.py",
            "layers.py",
            "loss.py",
            "mlp.py",
            "norm.py",
            "projection.py",
            "rotary.py",
        ),
    ),
    (
        penstock.compiler,
        (
            "backward_parts.py",
            "gelu.py",
            "generation.py",
            "graphs.py",
            "portable.py",
            "regions.py",
            "thin.py",
        ),
    ),
)
"""Files whose meaning is baked into the kernels."""

_DIVIDED = (
    (penstock.models, ("split_block.py",)),
    (penstock.compiler, ("split_regions.py",)),
)
"""Those of kernels of divided blocks besides."""

_ISA_FLAGS = (
    "avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx512ifma", "avx512vbmi", "avx512_vbmi2",
    "avx512_bitalg", "avx512_vpopcntdq", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "gfni",
    "vaes", "vpclmulqdq", "sha_ni", "sse4a", "clzero", "movbe", "adx", "rdseed",
)  # fmt: skip
"""Processor features the compiler may use when it compiles for the machine it runs on."""


@functools.cache
def source_hash(*, divided: bool = False) -> str:
    """SHA-256 over the sources the kernels are traced from, those of divided blocks too."""
    digest = hashlib.sha256()
    for package, names in (*_SOURCES, *(_DIVIDED if divided else ())):
        folder = Path(str(package.__file__)).parent
        for name in names:
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()


@functools.cache
def processor_features() -> list[str]:
    """Features of this processor that kernels may rely on, sorted; empty if unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return sorted(flag for flag in _ISA_FLAGS if flag in present)
    return []


@functools.cache
def torch_version() -> str:
    """Release of torch, such as 2.13.0, without the build tag."""
    return importlib.metadata.version("torch").split("+")[0]


def toolchain_fingerprint(toolchain: str, *, divided: bool = False) -> dict[str, Any]:
    """All of the above, plus platform, Python's word size, and what the toolchain itself adds; for
    kernels of divided blocks or of whole ones.

    Raises:
        ConfigError: no such toolchain is installed.
    """
    portable = toolchain == PORTABLE
    own = {} if portable else find_toolchain(toolchain).settings()
    settings = {"toolchain": toolchain, **own}
    return {
        "source": source_hash(divided=divided),
        "torch": torch_version(),
        "platform": f"{platform.system()}-{platform.machine()}-{sys.maxsize.bit_length() + 1}",
        "processor_features": [] if portable else processor_features(),
        "settings": settings,
    }
