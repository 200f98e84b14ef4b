"""What this machine is, how fast, and whether anything stands in the way."""

import dataclasses
import os
import shutil
import subprocess
import sys
from typing import Any

import torch

from penstock.compiler.fingerprint import processor_features, torch_version
from penstock.compiler.probe import measured_speeds
from penstock.compiler.toolchains import find_toolchain
from penstock.config.folders import user_cache_folder, user_config_folder
from penstock.console import Console
from penstock.hardware.detect import gpus, memory_bytes, processor_name, usable_cores
from penstock.hardware.process import loaded_openmp, process_report

_BUSY = 0.7
"""Share of the best speed below which the machine is said to be busy."""


@dataclasses.dataclass(frozen=True)
class DoctorReport:
    """Facts by name, and what needs attention."""

    facts: dict[str, Any]
    problems: list[str]

    def json(self) -> dict[str, Any]:
        """Everything."""
        return {**self.facts, "problems": self.problems}

    def show(self, console: Console) -> None:
        """A table, then the problems."""
        rows = [[name.replace("_", " "), str(value)] for name, value in self.facts.items()]
        console.table("This machine", ["", ""], rows)
        for problem in self.problems:
            console.warning(problem)
        if not self.problems:
            console.info("Nothing stands in the way.")


def examine(device: str) -> DoctorReport:
    """Look at everything that training depends on; measures speeds anew (a few seconds), and
    shows the best of all measurements, which plans count with.
    """
    now = measured_speeds(device, again=True)
    speeds = measured_speeds(device)
    compiler = _compiler()
    problems: list[str] = []
    share = now.bf16_flops / speeds.bf16_flops
    if share < _BUSY:
        problems.append(
            f"products in bf16 ran at {share:.0%} of the best measured here, which is shown: other "
            "programs are running"
        )
    elif device == "cpu" and os.getloadavg()[0] > 1.5 * usable_cores():
        problems.append(
            "other programs are running: speeds may be too low, run `penstock doctor` again "
            "when they have ended; the best is kept"
        )
    if compiler is None:
        problems.append("no C++ compiler: `compile` needs g++ or clang++; training runs eagerly")
    if len(loaded_openmp()) > 1:
        problems.append(
            f"more than one OpenMP runtime is loaded ({', '.join(loaded_openmp())}): kernels get "
            "several times slower; remove LD_PRELOAD or the second library"
        )
    if gpus() and not torch.cuda.is_available():
        problems.append("there is a GPU, but this torch was built without CUDA")
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch_version(),
        "device": device,
        "processor": processor_name(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "gpus": [name for name, _ in gpus()],
        "features": " ".join(processor_features()),
        "bf16_gflops": round(speeds.bf16_flops / 1e9, 1),
        "fp32_gflops": round(speeds.fp32_flops / 1e9, 1),
        **{
            f"{name}_gflops_in_blocks": round(speed / 1e9, 1)
            for name, speed in speeds.products_flops.items()
        },
        "copy_gigabytes_per_second": round(speeds.bandwidth_bytes_per_second / 1e9, 1),
        "link_gigabytes_per_second": None
        if speeds.link_bytes_per_second is None
        else round(speeds.link_bytes_per_second / 1e9, 2),
        "compute": "bf16" if speeds.bf16_flops > 1.2 * speeds.fp32_flops else "fp32",
        "compiler": compiler,
        **process_report(),
        "cache": str(user_cache_folder()),
        "keys": str(user_config_folder()),
    }
    return DoctorReport(facts, problems)


def _compiler() -> str | None:
    """First line of the C++ compiler's version; None without one."""
    for name in find_toolchain("inductor").settings()["compilers"]:
        program = shutil.which(name)
        if program is not None:
            result = subprocess.run(  # noqa: S603 - a fixed command
                [program, "--version"], capture_output=True, text=True, timeout=20, check=False
            )
            return result.stdout.splitlines()[0] if result.stdout else program
    return None
