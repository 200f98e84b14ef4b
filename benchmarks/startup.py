"""Start-up and compile time: an executable against torch.compile, cold and with a warm cache.

GPT-2 124M, 4 × 512 tokens, bf16; every contender in a process of its own, rounds interleaved,
medians. Run `benchmarks/training.py` once before: it makes the dataset and the executable. Prints
what it measured and writes build/benchmarks/startup.json.

    python benchmarks/startup.py               all of it
    python benchmarks/startup.py --rounds 2 --only first-step load build depth
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks"
PARTS = ("first-step", "load", "build", "depth")

OURS = """
import sys, time
from penstock.hardware.process import prepare_process
prepare_process()
import penstock
folder = sys.argv[1]
import penstock.training.trainer as trainer
step = trainer.train_step
def first(*a, **k):
    result = step(*a, **k)
    print(time.time(), flush=True)
    import os; os._exit(0)
trainer.train_step = first
penstock.train(executable=f"{folder}/gpt2.penstock", data={"path": f"{folder}/dataset"},
               run=sys.argv[2], train={"steps": 2, "tensorboard": False, "report": False})
"""
"""From the process's start to the end of the first training step."""

THEIRS = """
import time, torch, transformers
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_pdrop=0., embd_pdrop=0., resid_pdrop=0.))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
compiled = torch.compile(model)
tokens = torch.randint(0, 50257, (4, 512))
took = []
for step in range(2):
    started = time.time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    took.append(time.time() - started)
    if step == 0: print(time.time(), end=" ", flush=True)
print(took[0] - took[1], flush=True)
"""
"""The same; then how much longer the first step took than the second: what compiling takes."""

LOAD = """
import sys, time
from penstock.hardware.process import prepare_process
prepare_process()
import torch, penstock.jobs
from penstock.compiler.executable import Executable
started = time.perf_counter()
Executable.open(sys.argv[1]).kernels()
print(time.perf_counter() - started)
"""
"""Opening an executable: reading, verifying, loading machine code."""

BUILD = """
import json, sys, time
from penstock.hardware.process import prepare_process
prepare_process()
import penstock
started = time.perf_counter()
penstock.compile(compile={"cache": sys.argv[1]}, executable=f"{sys.argv[1]}/x.penstock",
                 precision={"compute": "bf16"}, **json.loads(sys.argv[2]))
print(time.perf_counter() - started)
"""
"""Building a training executable with an empty cache."""

GPT2 = {"model": {"preset": "gpt2"}, "batch": {"micro": 4}, "data": {"sequence_length": 512}}
NARROW = {"preset": "gpt2", "hidden_size": 256, "heads": 4, "mlp_size": 1024}


def run(code: str, *arguments: str, **environment: str) -> tuple[float, list[float]]:
    """When the process started, and the numbers it printed."""
    started = time.time()
    output = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    if not output.stdout.strip():
        sys.exit(output.stderr)
    return started, [float(word) for word in output.stdout.splitlines()[-1].split()]


def first_step() -> dict[str, float]:
    """Seconds from a process's start to its first step's end, and of torch.compile alone."""
    with tempfile.TemporaryDirectory() as scratch:
        started, (ours,) = run(OURS, str(FOLDER), f"{scratch}/run")
        found = {"first step, executable": ours - started}
        for cache in ("cold", "warm"):
            started, (done, compiling) = run(THEIRS, TORCHINDUCTOR_CACHE_DIR=f"{scratch}/inductor")
            found[f"first step, torch.compile {cache}"] = done - started
            found[f"compiling, torch.compile {cache}"] = compiling
    return found


def load() -> dict[str, float]:
    """Seconds to open an executable and load its kernels."""
    return {"load": run(LOAD, str(FOLDER / "gpt2.penstock"))[1][0]}


def build() -> dict[str, float]:
    """Seconds to build GPT-2 124M's training executable."""
    return {"build": _built(GPT2)}


def depth() -> dict[str, float]:
    """Seconds to build 12 and 48 layers of one width."""
    shapes = {"batch": {"micro": 2}, "data": {"sequence_length": 256}}
    return {
        f"build, {layers} layers": _built({"model": {**NARROW, "layers": layers}, **shapes})
        for layers in (12, 48)
    }


def _built(settings: dict) -> float:
    with tempfile.TemporaryDirectory() as cache:
        return run(BUILD, cache, json.dumps(settings))[1][0]


MEASURE: dict[str, Callable[[], dict[str, float]]] = {
    "first-step": first_step,
    "load": load,
    "build": build,
    "depth": depth,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for part in options.only:
            for name, seconds in MEASURE[part]().items():
                found.setdefault(name, []).append(seconds)
                print(f"round {number + 1}: {name}: {seconds:.3f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in found.items()}
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.3f} s")
    (FOLDER / "startup.json").write_text(json.dumps({"medians": medians, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
