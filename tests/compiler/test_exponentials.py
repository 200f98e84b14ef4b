"""Exponentials in compiled kernels, against float64."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys
import torch
from penstock.compiler.graphs import trace
from penstock.compiler.inductor import Inductor
from penstock.compiler.toolchains import Region

found = {}
for dtype in (torch.bfloat16, torch.float32):
    x = torch.cat([torch.linspace(-86, 88, 16 * 1024), torch.full((16,), -torch.inf)]).to(dtype)
    graph = trace(lambda x: (torch.exp(x.float()),), [x])
    region = Region("exp", graph.module, (x,), graph.outputs)
    toolchain = Inductor()
    run = toolchain.load("exp", toolchain.build(region, {"workspace": sys.argv[1]}))
    (result,) = run([x])
    exact = torch.exp(x.double())
    error = ((result.double() - exact).abs() / exact.clamp(min=1e-300))[:-16].max().item()
    found[str(dtype)] = [error, result[-16:].abs().max().item()]
print(json.dumps(found))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_they_are_exact_to_twenty_units_in_bf16_kernels_and_to_one_in_fp32(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=300, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    unit = 2**-23
    assert unit < found["torch.bfloat16"][0] < 20 * unit  # the quick one, as exact as it says
    assert found["torch.float32"][0] < 1.5 * unit
    # What attention masks out weighs nothing.
    assert found["torch.bfloat16"][1] == found["torch.float32"][1] == 0
