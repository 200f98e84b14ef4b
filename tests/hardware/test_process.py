"""Process-wide settings: the allocator before torch, and one OpenMP runtime."""

import subprocess
import sys

import pytest

from penstock.hardware.process import is_openmp


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    return result.stdout


def test_freed_buffers_stay_with_the_process() -> None:
    # A buffer of 64 MiB is given back to the kernel by default; kept, the pages stay resident.
    probe = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
if sys.argv[-1] == "kept":
    from penstock.hardware.process import prepare_process, process_report
    assert process_report()["allocator"] == "not set"
    prepare_process()
    prepare_process()
    assert process_report()["allocator"] == "freed memory is kept"
def resident():
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
buffer = libc.malloc(64 << 20)
ctypes.memset(buffer, 1, 64 << 20)
before = resident()
libc.free(buffer)
print(before - resident())
"""
    given_back = {}
    for mode in ("default", "kept"):
        command = [sys.executable, "-c", probe, mode]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        given_back[mode] = int(output)
    assert given_back["default"] > 60 << 20
    assert given_back["kept"] < 4 << 20


def test_torch_brings_exactly_one_openmp_runtime() -> None:
    code = """
import sys
from penstock.hardware.process import loaded_openmp, process_report
assert loaded_openmp() == [], loaded_openmp()
assert process_report()["openmp"] == "none loaded yet"
assert "torch" not in sys.modules
import torch
torch.ones(8).sum()
print(len(loaded_openmp()))
"""
    assert run(code).strip() == "1"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/lib/libgomp.so.1.0.0", True),
        ("/site-packages/torch.libs/libgomp-a34b3233.so.1", True),
        ("/opt/intel/libiomp5.so", True),
        ("/usr/lib/llvm-19/lib/libomp.so.5", True),
        ("/usr/lib/libomp5.so", True),
        ("/usr/lib/openmpi/libompitrace.so.40", False),
        ("/usr/lib/libgomp-plugin-nvptx.so.1", False),
        ("/usr/lib/libc.so.6", False),
    ],
)
def test_openmp_runtimes_are_known_by_name(path: str, expected: bool) -> None:
    assert is_openmp(path) is expected
