"""Machine code of one graph: how it is described, loaded and called.

`compiler/build.py` makes the bytes, `compiler/executable.py` keeps them,
`compiler/runtime.py` calls the kernels. No compiler and no tracer is imported here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.compiler.toolchains import Toolchain, find_toolchain
from penstock.errors import ExecutableError
from penstock.spans import span

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float32", "bfloat16", "float16", "float64"),
        *("int64", "int32", "int16", "uint8", "bool"),
    )
}


TABLE = "tokens.weight"
"""The embedding's parameter of whose gradient the backward kernel gives the rows (B, T, E) float32
that are to be added up: whole, it would be the largest tensor of a step, nearly all zeros."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Dtype, shape and strides (in elements) of one kernel argument; a size of -1 is any."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "TensorSpec":
        """Describe a real or fake tensor."""
        return TensorSpec(
            str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tuple(tensor.stride())
        )

    @staticmethod
    def contiguous(dtype: str, shape: tuple[int, ...]) -> "TensorSpec":
        """A dense tensor, of which only the first size may be -1."""
        stride = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
        return TensorSpec(dtype, shape, stride)

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape fits."""
        pairs = zip(self.shape, shape, strict=False)
        return len(shape) == len(self.shape) and all(own in (-1, size) for own, size in pairs)

    def describe(self) -> str:
        """Such as bfloat16[4, 512, 768]."""
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """One kernel's name and the exact tensors it takes and gives."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "KernelSpec":
        """Read what `to_json` wrote, checking every field."""

        def specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(
                    str(item["dtype"]),
                    tuple(int(size) for size in item["shape"]),
                    tuple(int(step) for step in item["stride"]),
                )
                for item in items
            )

        return KernelSpec(str(value["name"]), specs(value["inputs"]), specs(value["outputs"]))


@dataclasses.dataclass(frozen=True)
class RegionContract:
    """How a kernel's tensors map to its region's.

    A forward kernel takes the region's inputs and gives `output_count` outputs, then what is
    saved. A backward kernel takes the inputs at `kept_inputs`, then the saved, then the gradients
    of the outputs, and gives the gradients of the inputs at `differentiable`. Where that is done in
    two, the kernel of the input takes those of these that are `taken`, and gives besides what it
    hands over; the kernel of the weights takes from the same row, with what is handed over behind.
    """

    parameters: tuple[str, ...]
    """Names of the region's parameters, in the order of the kernel's first inputs."""
    output_count: int
    kept_inputs: tuple[int, ...] = ()
    differentiable: tuple[int, ...] = ()
    taken: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "RegionContract":
        """Read what `to_json` wrote, checking every field."""
        return RegionContract(
            parameters=tuple(str(name) for name in value["parameters"]),
            output_count=int(value["output_count"]),
            kept_inputs=tuple(int(index) for index in value["kept_inputs"]),
            differentiable=tuple(int(index) for index in value["differentiable"]),
            taken=tuple(int(index) for index in value.get("taken", ())),
        )


@dataclasses.dataclass(frozen=True)
class BuiltKernel:
    """Machine code of one kernel, its description, and its graph (`compiler/portable.py`)."""

    spec: KernelSpec
    contract: RegionContract
    code: bytes
    graph: str
    seconds: float
    reused: bool


class Kernel:
    """A loaded kernel: call it with tensors of exactly the shapes it was compiled for."""

    def __init__(self, spec: KernelSpec, code: bytes, toolchain: Toolchain) -> None:
        """Load code that `toolchain` has built and whose origin the caller has verified."""
        self.spec = spec
        self._expected = [(_DTYPES[s.dtype], s.shape, s.stride) for s in spec.inputs]
        self._run = toolchain.load(spec.name, code)
        self._span = f"kernel/{spec.name}"

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on `inputs`; outputs are new tensors, those of the optimizer's kernels their inputs.

        Raises:
            ExecutableError: an input has another dtype or shape than the kernel was made for
                (machine code would compute garbage).
        """
        if len(inputs) != len(self._expected):
            raise ExecutableError(
                f"kernel {self.spec.name} takes {len(self._expected)} tensors, got {len(inputs)}"
            )
        arguments: list[Tensor] = []
        for index, (tensor, (dtype, shape, stride)) in enumerate(
            zip(inputs, self._expected, strict=True)
        ):
            fits = tensor.shape == shape or self.spec.inputs[index].takes(tensor.shape)
            if tensor.dtype != dtype or not fits:
                raise ExecutableError(
                    f"kernel {self.spec.name} was compiled for "
                    f"{self.spec.inputs[index].describe()} as input {index}, "
                    f"got {TensorSpec.of(tensor).describe()}",
                    do="compile an executable for these shapes",
                )
            arguments.append(tensor if tensor.stride() == stride else _restride(tensor, stride))
        with span(self._span):
            return list(self._run(arguments))


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A loaded kernel and how its tensors map to its region's."""

    run: Kernel
    contract: RegionContract


def load_built(kernels: Mapping[str, BuiltKernel], toolchain: str) -> dict[str, CompiledKernel]:
    """Load kernels straight from the compiler or its cache, without a file between."""
    loader = find_toolchain(toolchain)
    return {
        name: CompiledKernel(Kernel(kernel.spec, kernel.code, loader), kernel.contract)
        for name, kernel in kernels.items()
    }


def _restride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Copy into the memory layout the kernel was compiled for."""
    result = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return result.copy_(tensor)
