"""Machine code of one graph: how it is described, loaded and called.

`compiler/toolchain.py` makes the bytes, `compiler/executable.py` keeps them,
`compiler/runtime.py` calls the kernels. No compiler and no tracer is imported here.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.errors import ExecutableError

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "bfloat16", "float16", "int64", "int32", "bool")
}
_SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE (linux/fcntl.h)."""
_F_ADD_SEALS = 1033


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Dtype, shape and strides (in elements) of one kernel argument."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "TensorSpec":
        """Describe a real or fake tensor."""
        return TensorSpec(
            str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tuple(tensor.stride())
        )

    @property
    def bytes(self) -> int:
        """Size of a dense tensor of this shape."""
        return torch.Size(self.shape).numel() * _DTYPES[self.dtype].itemsize

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
    of the outputs, and gives the gradients of the inputs at `differentiable`.
    """

    parameters: tuple[str, ...]
    """Names of the region's parameters, in the order of the kernel's first inputs."""
    output_count: int
    kept_inputs: tuple[int, ...] = ()
    differentiable: tuple[int, ...] = ()

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

    def __init__(self, spec: KernelSpec, code: bytes) -> None:
        """Load machine code whose origin the caller has verified."""
        self.spec = spec
        self._expected = [(_DTYPES[s.dtype], s.shape, s.stride) for s in spec.inputs]
        self._descriptor = _sealed_file(spec.name, code)
        path = f"/proc/self/fd/{self._descriptor}"
        self._runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1)  # pyright: ignore[reportAttributeAccessIssue] - torch's stubs lack it

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on `inputs`; outputs are new tensors.

        Raises:
            ExecutableError: an input has another dtype or shape than the kernel was made for
                (AOTInductor itself would compute garbage).
        """
        if len(inputs) != len(self._expected):
            raise ExecutableError(
                f"kernel {self.spec.name} takes {len(self._expected)} tensors, got {len(inputs)}"
            )
        arguments: list[Tensor] = []
        for index, (tensor, (dtype, shape, stride)) in enumerate(
            zip(inputs, self._expected, strict=True)
        ):
            if tensor.dtype != dtype or tensor.shape != shape:
                raise ExecutableError(
                    f"kernel {self.spec.name} was compiled for "
                    f"{self.spec.inputs[index].describe()} as input {index}, "
                    f"got {TensorSpec.of(tensor).describe()}",
                    do="compile an executable for these shapes",
                )
            arguments.append(tensor if tensor.stride() == stride else _restride(tensor, stride))
        return self._runner.run(arguments)


def _restride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Copy into the memory layout the kernel was compiled for."""
    result = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return result.copy_(tensor)


def _sealed_file(name: str, code: bytes) -> int:
    """Put verified code into an anonymous file nobody can change, so that what was verified is
    what runs. The descriptor stays open for good: the loader tells libraries apart by their path,
    and the path names the descriptor.
    """
    import fcntl  # noqa: PLC0415 - Linux only, as memfd_create is

    descriptor = os.memfd_create(f"penstock-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(code)
    while view:
        view = view[os.write(descriptor, view) :]
    fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
    return descriptor
