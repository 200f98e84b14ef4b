"""Lower traced graphs to machine code with Inductor, in parallel processes, through a cache.

`compiler/executable.py` calls `build_kernels`. This is the only module that starts a compiler;
nothing that runs an executable imports it.
"""

import concurrent.futures
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.compiler import signing
from penstock.compiler.fingerprint import compiler_settings, toolchain_fingerprint
from penstock.compiler.kernels import BuiltKernel, KernelSpec, RegionContract, TensorSpec
from penstock.compiler.plan import Plan
from penstock.config.folders import user_cache_folder
from penstock.console import get_console
from penstock.errors import ExecutableError
from penstock.files import atomic_write, canonical_json
from penstock.workers import worker_pool


def build_kernels(
    plan: Plan, *, workers: int | None = None, cache: Path | None = None
) -> dict[str, BuiltKernel]:
    """Return every kernel the plan's regions need, compiling those the cache does not have.

    Raises:
        ExecutableError: no working C++ compiler.
    """
    folder = _cache_folder(cache)
    names = kernel_names(plan)
    built = {name: found for name in names if (found := _from_cache(folder, plan, name))}
    missing = [name for name in names if name not in built]
    if built:
        get_console().info(f"reused from the kernel cache: {', '.join(built)}")
    if missing:
        _require_compiler()
        built |= _build_missing(plan, missing, folder, workers or os.cpu_count() or 1)
    return {name: built[name] for name in names}


def kernel_names(plan: Plan) -> tuple[str, ...]:
    """The kernels the plan's mode needs, those slow to compile first."""
    if plan.mode == "generate":
        return tuple(plan.generation_shapes().kernels())
    if plan.mode == "evaluate":
        return ("head_evaluate", "block_evaluate", "embed_evaluate")
    names = ["head_train", "block_backward", "block_forward", "head_evaluate"]
    names += ["embed_backward", "embed_forward"]
    if plan.architecture.dropout > 0:
        names += ["block_evaluate", "embed_evaluate"]
    return tuple(names)


def has_compiler() -> bool:
    """Whether a C++ compiler that Inductor would use is on the PATH."""
    return any(shutil.which(name) for name in compiler_settings()["compilers"])


def _require_compiler() -> None:
    """Refuse to compile without a compiler."""
    if not has_compiler():
        raise ExecutableError(
            "no C++ compiler was found",
            where="PATH",
            do="install g++, or train with compile.mode=off, or copy an executable made elsewhere",
        )


def _build_missing(
    plan: Plan, names: Sequence[str], folder: Path, workers: int
) -> dict[str, BuiltKernel]:
    """Compile kernels in worker processes, longest first, storing each as it is done."""
    built: dict[str, BuiltKernel] = {}
    workspace = folder / "inductor"
    workspace.mkdir(mode=0o700, exist_ok=True)
    with (
        get_console().progress("compiling kernels", total=len(names)) as progress,
        worker_pool(min(workers, len(names)), _prepare_worker, (str(workspace),)) as pool,
    ):
        plan_json = json.dumps(plan.to_json())
        jobs = {pool.submit(_build, plan_json, name): name for name in names}
        for job in concurrent.futures.as_completed(jobs):
            name = jobs[job]
            kernel = job.result()
            _to_cache(folder, plan, kernel)
            built[name] = kernel
            progress.advance(1, kernel=name, seconds=f"{kernel.seconds:.1f}")
    return built


def _prepare_worker(workspace: str) -> None:
    """Give Inductor a private workspace that later compilations share, and one thread each."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = workspace
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Torch 2.13 trips over a deprecation of its own when it copies graphs.
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")


def _build(plan_json: str, name: str) -> BuiltKernel:
    """Trace and compile one kernel (runs in a worker process)."""
    import torch  # noqa: PLC0415 - only worker processes load the compiler
    from torch._inductor import aot_compile  # noqa: PLC0415 - as above

    from penstock.compiler.portable import write_graph  # noqa: PLC0415 - as above
    from penstock.compiler.regions import trace_kernel  # noqa: PLC0415 - as above

    started = time.monotonic()
    traced = trace_kernel(Plan.from_json(json.loads(plan_json)), name)
    options = dict(compiler_settings()["options"])
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        options["aot_inductor.output_path"] = str(Path(scratch) / "kernel.so")
        torch.use_deterministic_algorithms(True)
        path = aot_compile(traced.graph.module, traced.graph.inputs, options=options)
        code = Path(str(path)).read_bytes()
    spec = KernelSpec(
        name,
        tuple(TensorSpec.of(tensor) for tensor in traced.graph.inputs),
        tuple(TensorSpec.of(tensor) for tensor in traced.graph.outputs),
    )
    text = write_graph(traced.graph.module)
    return BuiltKernel(spec, traced.contract, code, text, time.monotonic() - started, False)


def _cache_folder(cache: Path | None) -> Path:
    """The kernel cache: private to the user, since what is in it gets executed."""
    folder = (cache or user_cache_folder()) / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise ExecutableError(
            "the kernel cache belongs to another user",
            where=str(folder),
            do="choose another folder with compile.cache=FOLDER",
        )
    return folder


def _cache_key(plan: Plan, name: str) -> str:
    """Everything the machine code of kernel `name` depends on, hashed."""
    parts = {"kernel": name, "regions": plan.region_fields(), "toolchain": toolchain_fingerprint()}
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def _from_cache(folder: Path, plan: Plan, name: str) -> BuiltKernel | None:
    """Read a kernel from the cache; a damaged or unsigned entry counts as absent."""
    entry = folder / _cache_key(plan, name)
    try:
        description = (entry / "kernel.json").read_bytes()
        signature = json.loads((entry / "signature.json").read_bytes())
        code = (entry / "kernel.so").read_bytes()
        if not signing.verifies(description, signature):
            return None
        value: dict[str, Any] = json.loads(description)
        if hashlib.sha256(code).hexdigest() != value["sha256"]:
            return None
        return BuiltKernel(
            KernelSpec.from_json(value["spec"]),
            RegionContract.from_json(value["contract"]),
            code,
            str(value["graph"]),
            float(value["seconds"]),
            True,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _to_cache(folder: Path, plan: Plan, kernel: BuiltKernel) -> None:
    """Store a kernel; the signature is written last and makes the entry count."""
    entry = folder / _cache_key(plan, kernel.spec.name)
    entry.mkdir(exist_ok=True, mode=0o700)
    description = canonical_json(
        {
            "spec": kernel.spec.to_json(),
            "contract": kernel.contract.to_json(),
            "sha256": hashlib.sha256(kernel.code).hexdigest(),
            "graph": kernel.graph,
            "seconds": kernel.seconds,
        }
    ).encode()
    atomic_write(entry / "kernel.so", kernel.code)
    atomic_write(entry / "kernel.json", description)
    atomic_write(entry / "signature.json", json.dumps(signing.sign(description)))
