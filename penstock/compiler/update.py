"""Kernels of the optimizer: AdamW over masters held in two halves, and gradients' sums of squares.

Torch's fused update wants whole masters and float32 gradients, so that memory is crossed several
times; these read and write everything once (`cpp/update`). The toolchain of CPUs builds and loads
them as two kernels more of each executable for training in bf16; `training/optimizer.py` and
`training/gradient_norm.py` call them. It must never know what the parameters belong to.
"""

import ctypes
import functools
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.compiler.cpp_compiler import found_compiler, run_compiler
from penstock.compiler.sealed import sealed_file
from penstock.errors import ExecutableError

if TYPE_CHECKING:
    from torch import Tensor

ADAMW = "adamw"
"""(n,) bf16 weights, int16 rests, float32 first and second moments, all changed in place; bf16
gradients; the float32 `SETTINGS`."""
SQUARES = "squares"
"""(n,) bf16 numbers, and (⌈n / PIECE⌉,) float64 to put the sums of their squares."""
KERNELS = (ADAMW, SQUARES)
SETTINGS = 8
"""What a master is multiplied by (decay); the step size (learning rate over 1 - β₁ᵗ); 1 - β₁; β₂;
1 - β₂; 1 / √(1 - β₂ᵗ); ε; what gradients are multiplied by (clipping)."""
PIECE = 4096
"""Numbers in one sum of squares."""

_SOURCE = Path(__file__).parent / "cpp" / "update" / "update.cpp"
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden",
)  # fmt: skip


@functools.cache
def source_hash() -> str:
    """SHA-256 over what the kernels are made of."""
    return hashlib.sha256(" ".join(_FLAGS).encode() + _SOURCE.read_bytes()).hexdigest()


def kernel_tensors(name: str) -> tuple[list[tuple[str, tuple[int, ...]]], list[int]]:
    """Dtype and shape of a kernel's inputs, -1 for any size, and which of them are its outputs."""
    if name == SQUARES:
        return [("bfloat16", (-1,)), ("float64", (-1,))], [1]
    state = ("bfloat16", "int16", "float32", "float32", "bfloat16")
    return [*((dtype, (-1,)) for dtype in state), ("float32", (SETTINGS,))], [0, 1, 2, 3]


def build_update() -> bytes:
    """The shared library of both kernels.

    Raises:
        ExecutableError: the compiler fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "update.so"
        command = [str(found_compiler()), *_FLAGS, str(_SOURCE), "-o", str(output)]
        run_compiler(command, what="the optimizer's kernels", do="train with compile.mode=off")
        return output.read_bytes()


class Update:
    """One of the loaded kernels, as a function of tensors (`kernel_tensors`)."""

    def __init__(self, name: str, code: bytes) -> None:
        """Open the library from memory; its origin has been verified."""
        library = ctypes.CDLL(f"/proc/self/fd/{sealed_file(name, code)}")
        inputs, self._outputs = kernel_tensors(name)
        self._run: Any = getattr(library, f"penstock_{name}")
        self._run.argtypes = (*(ctypes.c_void_p for _ in inputs), ctypes.c_int64)
        self._run.restype = None
        self._same = len(inputs) - 1

    def __call__(self, inputs: "Sequence[Tensor]") -> "list[Tensor]":
        """Change the outputs among the inputs in place.

        Raises:
            ExecutableError: tensors that belong together differ in length.
        """
        count = len(inputs[0])
        if self._same == 1:
            fits = len(inputs[1]) == -(-count // PIECE)
        else:
            fits = all(len(tensor) == count for tensor in inputs[: self._same])
        if not fits:
            raise ExecutableError("an update's tensors differ in length")
        self._run(*(tensor.data_ptr() for tensor in inputs), count)
        return [inputs[index] for index in self._outputs]
