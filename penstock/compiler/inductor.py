"""The toolchain of CPUs: AOTInductor and a C++ compiler make machine code with weights as inputs.

`compiler/toolchains.py` finds it. Loading needs neither of the two, and must never import them.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from penstock.compiler import operators, update
from penstock.compiler.cpp_compiler import COMPILERS, found_compiler
from penstock.compiler.sealed import sealed_file
from penstock.compiler.toolchains import Region, Run

_QUICK_EXPONENTIAL = "exp_u20"
"""In kernels of bf16: torch's own of its attention on CPUs, to 20 units in float32's last place (a
400th of one in bf16's). The vector library's, to one, takes three times as long."""
_CURRENT_GCC = 12
"""Knows AVX2, AVX-512, VNNI and AMX, all that torch 2.13 makes code for."""


class Inductor:
    """See `toolchains.Toolchain`."""

    def problem(self) -> str | None:
        """A C++ compiler must be on the PATH."""
        return None if found_compiler() else "no C++ compiler was found: install g++"

    def settings(self) -> dict[str, Any]:
        """Inductor options and the compilers looked for, the same for every kernel."""
        return {
            "compilers": list(COMPILERS),
            "bf16_exponential": _QUICK_EXPONENTIAL,
            "operators": operators.settings(),
            "update": update.source_hash(),
            "options": {
                "aot_inductor.compile_wrapper_opt_level": "O0",
                "aot_inductor.enable_line_tables": False,
                "cpp.dynamic_threads": True,
            },
        }

    def build(self, region: Region, options: Mapping[str, Any]) -> bytes:
        """A shared library."""
        if region.name in update.KERNELS:
            return update.build_update()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(options["workspace"])
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # Torch 2.13 trips over a deprecation of its own when it copies graphs.
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
        import torch  # noqa: PLC0415 - only worker processes load the compiler
        from torch._inductor import aot_compile  # noqa: PLC0415 - as above

        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            output = {"aot_inductor.output_path": str(Path(scratch) / "kernel.so")}
            torch.use_deterministic_algorithms(True)
            given = {**self.settings()["options"], **output, **_skipped_checks()}
            is_bf16 = any(tensor.dtype == torch.bfloat16 for tensor in region.inputs)
            with contextlib.ExitStack() as inside:
                if is_bf16:
                    inside.enter_context(_quick_exponentials())
                    given |= _own_operators(region, str(options["workspace"]))
                made = Path(str(aot_compile(region.module, region.inputs, options=given)))
            _strip(made)
            return made.read_bytes()

    def takes_attention(self, compute: str, head_size: int, length: int) -> bool:
        """See `build.py`: where it has an operator of its own for it."""
        return operators.takes_attention(compute, head_size, length)

    def load(self, name: str, code: bytes) -> Run:
        """Open the library from memory."""
        if name in update.KERNELS:
            return update.Update(name, code)
        import torch  # noqa: PLC0415 - settings are asked for without it

        descriptor = sealed_file(name, code)
        runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(  # pyright: ignore[reportAttributeAccessIssue] - torch's stubs lack it
            f"/proc/self/fd/{descriptor}", 1
        )
        return runner.run


@contextlib.contextmanager
def _quick_exponentials() -> Generator[None]:
    """Have Inductor write `_QUICK_EXPONENTIAL` for exponentials of vectors inside."""
    from torch._inductor.codegen.cpp import (  # noqa: PLC0415 - only worker processes load the compiler
        CppVecOverrides,
    )

    accurate = CppVecOverrides.__dict__["exp"]
    CppVecOverrides.exp = staticmethod(lambda x: f"{x}.{_QUICK_EXPONENTIAL}()")  # pyright: ignore[reportAttributeAccessIssue] - a method of torch's, for a while another
    try:
        yield
    finally:
        CppVecOverrides.exp = accurate


def _own_operators(region: Region, workspace: str) -> dict[str, Any]:
    """Have a region call operators of our own where they fit; options for compiling it."""
    if not operators.available():
        return {}
    from penstock.compiler.operator_library import (  # noqa: PLC0415 - loads torch
        LIBRARY,
        build_library,
    )
    from penstock.compiler.substitution import substitute  # noqa: PLC0415 - as above

    used = substitute(region.module)
    if not used:
        return {}
    folder = str(build_library(Path(workspace)).parent)
    folders = os.environ.get("LIBRARY_PATH", "").split(os.pathsep)
    if folder not in folders:
        os.environ["LIBRARY_PATH"] = os.pathsep.join([folder, *filter(None, folders)])
    return {
        "aot_inductor.custom_ops_to_c_shims": used,
        "aot_inductor.custom_op_libs": [LIBRARY],
    }


def _skipped_checks() -> dict[str, Any]:
    """Before its first kernel torch compiles and runs a program for each vector instruction set
    the processor has, ten seconds, to see that the compiler knows it: those since GCC 12 do.
    """
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-dumpfullversion"]
    try:
        asked = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - no shell
        is_current = int(asked.stdout.split(".")[0]) >= _CURRENT_GCC
    except (OSError, ValueError, subprocess.CalledProcessError):
        is_current = False  # clang, or none: torch finds out
    return {"cpp.vec_isa_ok": True} if is_current else {}


def _strip(library: Path) -> None:
    """Leave out the names that only a debugger reads, half the file, where binutils can; every
    start reads and verifies what is left.
    """
    program = shutil.which("strip")
    if program is not None:
        command = [program, "--strip-unneeded", str(library)]
        subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - no shell, own file
