"""The toolchain of generation on CPUs: one hand-written kernel for all blocks and the head.

The kernel (`cpp/step.cpp`) takes any number of new tokens of any texts, reads weights once in the
order in which `inference/packing.py` has laid them out, and keeps the key-value cache in place. It
is compiled for one architecture's sizes; depth stays open. `compiler/toolchains.py` finds it.
"""

import ctypes
import functools
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.compiler.cpp_compiler import COMPILERS, found_compiler, run_compiler
from penstock.compiler.fingerprint import processor_features
from penstock.compiler.sealed import sealed_file
from penstock.compiler.toolchains import Region, Run
from penstock.errors import ExecutableError
from penstock.models.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

STEP_KERNEL = "transformer_step"
"""All blocks over new tokens of any texts, and logits of some of them."""
LANES = 16
"""Outputs in a panel of packed weights, positions in a panel of cached keys: a vector register."""
BLOCK_PIECES = 19
"""Packed pieces of a block, there or not: norms 2 each, matrices 3 (weight, scale, bias)."""
HEAD_PIECES = 5
"""The same of the head."""

_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp",
    "-fPIC", "-shared", "-fvisibility=hidden",
)  # fmt: skip
_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni")
"""Processor features the kernel is written for."""


class Native:
    """See `toolchains.Toolchain`. Its one region is the whole model: `STEP_KERNEL`."""

    def problem(self) -> str | None:
        """It needs a C++ compiler, and a processor with AVX-512 for bf16 and int8."""
        missing = [name for name in _FEATURES if name not in processor_features()]
        if missing:
            return f"this processor lacks {', '.join(missing)}: use compile.toolchain=inductor"
        if found_compiler() is None:
            return "no C++ compiler was found: install g++"
        return None

    def settings(self) -> dict[str, Any]:
        """Compilers, flags and the kernel's sources."""
        return {
            "compilers": list(COMPILERS),
            "flags": list(_FLAGS),
            "kernel_source": _source_hash(),
        }

    def build(self, region: Region, options: Mapping[str, Any]) -> bytes:
        """A shared library. options["architecture"]: an `Architecture`; options["compute"]: the
        format of the cache, bf16 or fp32; options["weights"]: that of matrices, or int8.

        Raises:
            ExecutableError: the region is not the step of a whole model, or the compiler fails.
        """
        if region.name != STEP_KERNEL:
            raise ExecutableError(
                f"the native toolchain has no kernel {region.name}: it is for generating",
                where="compile.toolchain",
                do="leave compile.toolchain out",
            )
        compiler = str(found_compiler())
        with tempfile.TemporaryDirectory() as scratch:
            prologue, output = Path(scratch) / "config.hpp", Path(scratch) / "kernel.so"
            kinds = (options[name] for name in ("architecture", "compute", "weights"))
            prologue.write_text(_prologue(*kinds))
            source = str(_SOURCES / "step.cpp")
            command = [compiler, *_FLAGS, "-include", str(prologue), source, "-o", str(output)]
            run_compiler(command, what="the generation kernel", do="use compile.toolchain=inductor")
            return output.read_bytes()

    def load(self, name: str, code: bytes) -> Run:
        """Open the library from memory; see `_Step` for what it takes and gives."""
        return _Step(ctypes.CDLL(f"/proc/self/fd/{sealed_file(name, code)}"))


class _Call(ctypes.Structure):
    """`Call` of cpp/step.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "offsets", "cache", "x", "texts")),
        *((name, ctypes.c_void_p) for name in ("positions", "turns", "wanted", "logits")),
        *((name, ctypes.c_int64) for name in ("layers", "count", "wanted_count")),
        *((name, ctypes.c_int64) for name in ("cache_texts", "capacity", "threads")),
    )


class _Step:
    """The loaded kernel as a function of tensors (see `step_tensors`)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._step = library.penstock_step
        self._step.argtypes = (ctypes.POINTER(_Call),)
        self._step.restype = ctypes.c_int

    def __call__(self, inputs: "Sequence[Tensor]") -> "list[Tensor]":
        """Logits (W, V) float32; x is overwritten."""
        import torch  # noqa: PLC0415 - settings are asked for without it

        _, offsets, cache, x, texts, positions, turns, wanted, logits = inputs
        layers, count = cache.shape[0], x.shape[0]
        sizes = {len(texts), len(positions), len(turns), count}
        pieces = layers * BLOCK_PIECES + HEAD_PIECES
        if sizes != {count} or len(offsets) != pieces or len(logits) != len(wanted):
            raise ExecutableError("the generation kernel was given tensors of different lengths")
        pointers = [tensor.data_ptr() for tensor in inputs]
        call = _Call(
            *pointers, layers, count, len(wanted), cache.shape[1], cache.shape[3],
            torch.get_num_threads(),
        )  # fmt: skip
        if self._step(ctypes.byref(call)):
            raise ExecutableError("a token is outside the generation kernel's cache")
        return [logits]


def step_tensors(
    architecture: Architecture, *, compute: str, texts: int, capacity: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the kernel's inputs; -1: any size.

    Packed weights, their offsets, the cache, x (N, D), of each token its text, position and
    rotation (2, P), which tokens to give logits of, and where to put those.
    """
    a = architecture
    value_width = -(-a.head_size // LANES) * LANES
    cache = (-1, texts, a.heads // a.group_size, cache_places(capacity), a.head_size + value_width)
    return [
        ("uint8", (-1,)),
        ("int64", (-1,)),
        ("float32" if compute == "fp32" else "bfloat16", cache),
        ("float32", (-1, a.hidden_size)),
        ("int64", (-1,)),
        ("int64", (-1,)),
        ("float32", (-1, 2, a.rotary_size // 2)),
        ("int64", (-1,)),
        ("float32", (-1, a.vocab_size)),
    ]


def cache_places(capacity: int) -> int:
    """Positions the cache has room for: whole panels."""
    return -(-capacity // LANES) * LANES


@functools.cache
def _source_hash() -> str:
    """SHA-256 over the kernel's C++ sources and what writes their constants."""
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted(_SOURCES.glob("*.?pp"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _prologue(architecture: Architecture, compute: str, weights: str) -> str:
    """The constants the kernel is compiled for, before its source."""
    a = architecture
    truth = {True: "true", False: "false"}
    sizes = {
        "hidden": a.hidden_size,
        "heads": a.heads,
        "kv_heads": a.heads // a.group_size,
        "mlp": a.mlp_size,
        "vocabulary": a.vocab_size,
        "rotary_pairs": a.rotary_size // 2,
    }
    lines = [
        f"#define FORMAT_{weights.upper()}",
        f"#define CACHE_{compute.upper()}",
        "namespace config {",
        "enum class Residual { sequential, parallel, parallel_one_norm };",
        "enum class Activation { gelu_tanh, gelu, silu, relu };",
        *(f"constexpr int {name} = {value};" for name, value in sizes.items()),
        f"constexpr bool rotary_halves = {truth[a.rotary_pairs == 'halves']};",
        f"constexpr bool gated = {truth[a.gated_mlp]};",
        f"constexpr Residual residual = Residual::{a.residual};",
        f"constexpr Activation activation = Activation::{a.activation};",
        f"constexpr float epsilon = {a.norm_epsilon!r}f;",
        "}",
    ]
    return "\n".join(lines) + "\n"
