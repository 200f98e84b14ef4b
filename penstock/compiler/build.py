"""Build a plan's kernels with a toolchain, in parallel processes, through a cache.

`api.py` and `jobs.py` call `build_kernels`. Nothing that runs an executable imports it.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from penstock.compiler import signing, update
from penstock.compiler.fingerprint import toolchain_fingerprint
from penstock.compiler.generation import decode_kernel
from penstock.compiler.kernels import BuiltKernel, KernelSpec, RegionContract, TensorSpec
from penstock.compiler.native import STEP_KERNEL, step_tensors
from penstock.compiler.plan import Plan
from penstock.compiler.toolchains import PORTABLE, Region, find_toolchain
from penstock.config.folders import user_cache_folder
from penstock.console import get_console
from penstock.errors import ConfigError, ExecutableError
from penstock.files import atomic_write, canonical_json
from penstock.workers import worker_pool


def build_kernels(
    plan: Plan,
    *,
    toolchain: str = "inductor",
    workers: int | None = None,
    cache: Path | None = None,
) -> dict[str, BuiltKernel]:
    """Return every kernel the plan's regions need, building those the cache does not have.

    Raises:
        ConfigError: there is no such toolchain, or it has no kernels for the plan.
        ExecutableError: it cannot build on this machine.
    """
    _require_kernels(plan, toolchain)
    folder = _cache_folder(cache)
    names = kernel_names(plan, toolchain)
    keys = {name: _cache_key(plan, name, toolchain) for name in names}
    built = {name: found for name, key in keys.items() if (found := _from_cache(folder / key))}
    missing = [name for name in names if name not in built]
    if built:
        get_console().info(f"reused from the kernel cache: {', '.join(built)}")
    if missing:
        problem = find_toolchain(toolchain).problem()
        if problem is not None:
            raise ExecutableError(
                f"{toolchain} cannot build here: {problem}",
                where="compile.toolchain",
                do="or train with compile.mode=off, or copy an executable made elsewhere",
            )
        workers = workers or os.cpu_count() or 1
        built |= _build_missing(plan, missing, folder, workers, toolchain)
    return {name: built[name] for name in names}


def kernel_names(plan: Plan, toolchain: str) -> tuple[str, ...]:
    """The kernels the plan's mode needs, those slow to compile first."""
    if plan.mode == "generate" and toolchain == "native":
        return (STEP_KERNEL,)
    if plan.mode == "generate":
        return tuple(plan.generation_shapes().kernels())
    if plan.mode == "evaluate":
        return ("head_evaluate", "block_evaluate", "embed_evaluate")
    regions = ("block",) if plan.tensor == 1 else ("attend", "feed")
    names = ["head_train", *(f"{region}_backward" for region in regions)]
    names += [*(f"{region}_forward" for region in regions), "head_evaluate"]
    names += ["embed_backward", "embed_forward"]
    if plan.schedule == "zero-bubble":
        parts = ("weights", "input")
        names[2:2] = [f"{region}_backward_{part}" for region in regions for part in parts]
    if plan.architecture.adapter is not None:
        names.remove("embed_backward")  # nothing there is trained
    if plan.architecture.has_dropout:
        names += [f"{regions[0]}_evaluate", "embed_evaluate"]
    if plan.architecture.adapter_rate > 0 and plan.tensor > 1:
        names.append("feed_evaluate")
    if plan.architecture.dropout > 0 and plan.tensor > 1:
        names += [
            f"{name}_{part}" for name in ("attended", "fed") for part in ("backward", "forward")
        ]
    if toolchain == "inductor" and plan.compute == "bf16":
        names += update.KERNELS
    return tuple(names)


def _require_kernels(plan: Plan, toolchain: str) -> None:
    """Refuse a toolchain that has nothing for the plan."""
    is_native = toolchain == "native"
    if is_native and plan.mode != "generate":
        raise ConfigError(
            f"the native toolchain makes executables for generating, not for mode={plan.mode}",
            where="compile.toolchain",
            do="leave compile.toolchain out, or set mode=generate",
        )
    if plan.weights is not None and not is_native:
        raise ConfigError(
            f"the {toolchain} toolchain has no kernels for {plan.weights} weights",
            where="precision.weights",
            do="leave precision.weights or compile.toolchain out"
            if find_toolchain("native").problem() is None
            else "leave precision.weights out, or generate without an executable",
        )


def trace_graphs(plan: Plan) -> dict[str, BuiltKernel]:
    """Every kernel's description and graph, without code: for a machine with no toolchain here."""
    here = dataclasses.replace(plan, device="cpu")  # graphs name no device they must run on
    return {name: _trace(here, name)[0] for name in kernel_names(plan, PORTABLE)}


def _build_missing(
    plan: Plan, names: Sequence[str], folder: Path, workers: int, toolchain: str
) -> dict[str, BuiltKernel]:
    """Build kernels in worker processes, longest first."""
    built: dict[str, BuiltKernel] = {}
    with (
        get_console().progress("compiling kernels", total=len(names)) as progress,
        worker_pool(min(workers, len(names))) as pool,
    ):
        plan_json = json.dumps(plan.to_json())
        jobs = {pool.submit(_build, plan_json, name, folder, toolchain): name for name in names}
        for job in concurrent.futures.as_completed(jobs):
            name = jobs[job]
            built[name] = job.result()
            progress.advance(1, kernel=name, seconds=f"{built[name].seconds:.1f}")
    return built


def _build(plan_json: str, name: str, folder: Path, toolchain: str) -> BuiltKernel:
    """Trace, build and store one kernel (runs in a worker process).

    Whoever else wants the same kernel at the same time waits, and finds it in the cache.
    """
    plan = Plan.from_json(json.loads(plan_json))
    key = _cache_key(plan, name, toolchain)
    with _locked(folder / f"{key}.lock"):
        found = _from_cache(folder / key)
        if found is not None:
            return found
        started = time.monotonic()
        with _attention_for(plan, toolchain):
            kernel, region = _trace(plan, name)
        workspace = folder / toolchain
        workspace.mkdir(mode=0o700, exist_ok=True)
        options = {
            "workspace": str(workspace),
            "architecture": plan.architecture,
            "compute": plan.compute,
            "weights": plan.weights or plan.compute,
        }
        code = find_toolchain(toolchain).build(region, options)
        built = dataclasses.replace(kernel, code=code, seconds=time.monotonic() - started)
        _to_cache(folder / key, built)
    return built


def _attention_for(plan: Plan, toolchain: str) -> contextlib.AbstractContextManager[None]:
    """Where a toolchain says it takes attention as one operator, graphs traced inside have it."""
    from penstock.models.attention import attention_as_one  # noqa: PLC0415 - loads torch

    takes = getattr(find_toolchain(toolchain), "takes_attention", None)
    sizes = (plan.compute, plan.architecture.head_size, plan.sequence_length)
    wanted = takes is not None and plan.mode != "generate" and takes(*sizes)
    return attention_as_one() if wanted else contextlib.nullcontext()


def _trace(plan: Plan, name: str) -> tuple[BuiltKernel, Region]:
    """A kernel without its code, and the region to build it from."""
    from penstock.compiler.portable import write_graph  # noqa: PLC0415 - loads torch's tracer
    from penstock.compiler.regions import trace_kernel  # noqa: PLC0415 - as above
    from penstock.compiler.split_regions import trace_part  # noqa: PLC0415 - as above

    if name in update.KERNELS:
        return _trace_update(name)
    shapes = plan.generation_shapes()
    # The native kernel is no graph: it carries that of one block, for reading.
    graph_of = decode_kernel(1, shapes.capacity) if name == STEP_KERNEL else name
    traced = (trace_part if _is_part(plan, name) else trace_kernel)(plan, graph_of)
    graph = traced.graph
    region = Region(name, graph.module, graph.inputs, graph.outputs)
    inputs, outputs = (
        tuple(TensorSpec.of(tensor) for tensor in tensors)
        for tensors in (graph.inputs, graph.outputs)
    )
    if name == STEP_KERNEL:
        tensors = step_tensors(
            plan.architecture,
            compute=plan.compute,
            texts=plan.micro,
            capacity=plan.sequence_length,
        )
        inputs = tuple(TensorSpec.contiguous(dtype, shape) for dtype, shape in tensors)
        outputs = inputs[-1:]
    spec = KernelSpec(name, inputs, outputs)
    kernel = BuiltKernel(spec, traced.contract, b"", write_graph(graph.module), 0.0, False)
    return kernel, region


def _trace_update(name: str) -> tuple[BuiltKernel, Region]:
    """The same of a kernel of the optimizer, which takes tensors of any length."""
    from penstock.compiler.portable import write_graph  # noqa: PLC0415 - loads torch's tracer
    from penstock.compiler.update_graphs import trace_update  # noqa: PLC0415 - as above

    graph = trace_update(name)
    tensors, changed = update.kernel_tensors(name)
    inputs = tuple(TensorSpec.contiguous(dtype, shape) for dtype, shape in tensors)
    spec = KernelSpec(name, inputs, tuple(inputs[index] for index in changed))
    text = write_graph(graph.module)
    kernel = BuiltKernel(spec, RegionContract((), len(changed)), b"", text, 0.0, False)
    return kernel, Region(name, graph.module, graph.inputs, graph.outputs)


def _is_part(plan: Plan, name: str) -> bool:
    """Whether a kernel is of a part of a divided block."""
    return plan.tensor > 1 and name.partition("_")[0] not in ("embed", "head")


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None, None, None]:
    """Hold a lock that ends with the process; the empty file stays, since removing it would let
    two processes lock two files of one name.
    """
    with path.open("wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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


def _cache_key(plan: Plan, name: str, toolchain: str) -> str:
    """Everything the code of kernel `name` depends on, hashed."""
    made_by = toolchain_fingerprint(toolchain, divided=_is_part(plan, name))
    parts = {"kernel": name, "regions": plan.kernel_fields(name), "toolchain": made_by}
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def _from_cache(entry: Path) -> BuiltKernel | None:
    """Read a kernel from the cache; a damaged or unsigned entry counts as absent."""
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


def _to_cache(entry: Path, kernel: BuiltKernel) -> None:
    """Store a kernel; the signature is written last and makes the entry count."""
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
