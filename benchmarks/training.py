"""Whole training steps of GPT-2 124M, 4 × 512 tokens: Penstock against its peers.

Peers are `transformers` Trainer, in float32 (its default) and in bf16; a model of `transformers`
compiled whole by `torch.compile` in a bf16 autocast loop; and a plain PyTorch loop in the manner of
nanoGPT (`plain_gpt.py`). Every contender runs in a process of its own, as its users run it; rounds
are interleaved and the medians compared. One more process of each round multiplies bf16 matrices
and nothing else: what a machine gives changes from minute to minute, and with it what a step could
have reached. Prints a table and writes build/benchmarks/training.json after each run.

    make bench                                  five rounds of all
    python benchmarks/training.py --rounds 1 --steps 6 --contenders "penstock bf16" "plain bf16"
    python benchmarks/training.py --resume      go on where a run was stopped
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks"
MICRO, LENGTH, WARMUP = 4, 512, 2
OURS, PRODUCTS = "penstock bf16", "bf16 products alone"


def penstock_bf16(steps: int) -> dict:
    """`penstock train` from an executable."""
    import shutil

    from penstock.hardware.process import prepare_process

    prepare_process()
    import penstock
    from penstock.compiler.executable import Executable

    executable, run = FOLDER / "gpt2.penstock", FOLDER / "run"
    shutil.rmtree(run, ignore_errors=True)
    values = penstock.train(
        executable=str(executable),
        data={"path": str(FOLDER / "dataset"), "validation_split": "validation"},
        run=str(run),
        train={
            "steps": steps,
            "throughput_warmup_steps": WARMUP,
            "report": False,
            "tensorboard": False,
            "evaluate_sequences": 4,
        },
    ).values
    speed = values["throughput"]["tokens_per_second"]
    return {
        "tokens_per_second": speed,
        "memory_bytes": values["memory_bytes"],
        "flops_per_second": speed * Executable.open(executable).plan.flops_per_token,
    }


def products(steps: int) -> dict:
    """The peak of bf16 products, as `penstock doctor` measures it, for some seconds."""
    import torch

    size, seconds = 1536, []
    left, right, out = (torch.ones(size, size, dtype=torch.bfloat16) for _ in range(3))
    for _ in range(100 * steps):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - began)
    flops = 2 * size**3
    return {"flops_per_second": flops / statistics.median(seconds), "best": flops / min(seconds)}


def blocks():
    """The tokens Penstock trains on, cut into blocks, as a dataset of torch."""
    import numpy as np
    import torch

    tokens = np.fromfile(FOLDER / "dataset" / "train.bin", np.uint16).astype(np.int64)

    class Blocks(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(tokens) // LENGTH

        def __getitem__(self, index: int) -> dict:
            block = torch.from_numpy(tokens[index * LENGTH : (index + 1) * LENGTH])
            return {"input_ids": block, "labels": block}

    return Blocks()


def figures(ends: list[float]) -> dict:
    """Speed between the warm-up's end and the last step's, and this process's peak memory."""
    seconds = (ends[-1] - ends[WARMUP - 1]) / (len(ends) - WARMUP)
    return {
        "tokens_per_second": MICRO * LENGTH / seconds,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def gpt2_of_transformers():
    """GPT-2 124M without dropout."""
    import transformers

    config = transformers.GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


def trainer(steps: int, *, bf16: bool) -> dict:
    """`transformers.Trainer` with its defaults, on the same tokens."""
    import transformers

    class Clock(transformers.TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, *arguments: object, **more: object) -> None:
            self.ends.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=str(FOLDER / "trainer"),
        per_device_train_batch_size=MICRO,
        max_steps=steps,
        use_cpu=True,
        bf16=bf16,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model, clock = gpt2_of_transformers(), Clock()
    transformers.Trainer(model, arguments, train_dataset=blocks(), callbacks=[clock]).train()
    return figures(clock.ends)


def loop(steps: int, *, compiled: bool) -> dict:
    """A bf16 autocast loop with fused AdamW and clipping: over a model of `transformers` that
    torch.compile has compiled whole, or over the plain one.
    """
    # What the first round compiles is kept for the later ones; it is not part of what is timed.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(FOLDER / "inductor")
    import torch
    from plain_gpt import PlainGPT, optimizer_for

    model = gpt2_of_transformers() if compiled else PlainGPT()
    optimizer = optimizer_for(model)
    call = torch.compile(model) if compiled else model
    batches = iter(torch.utils.data.DataLoader(blocks(), batch_size=MICRO, shuffle=True))
    ends: list[float] = []
    for _ in range(steps):
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            if compiled:
                loss = call(batch["input_ids"], labels=batch["labels"]).loss
            else:
                loss = call(batch["input_ids"], batch["labels"].roll(-1, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.perf_counter())
    return figures(ends)


CONTENDERS: dict[str, Callable[[int], dict]] = {
    PRODUCTS: products,
    OURS: penstock_bf16,
    "trainer fp32": lambda steps: trainer(steps, bf16=False),
    "trainer bf16": lambda steps: trainer(steps, bf16=True),
    "compiled bf16": lambda steps: loop(steps, compiled=True),
    "plain bf16": lambda steps: loop(steps, compiled=False),
}


def prepare() -> None:
    """Dataset and executable, made once."""
    from penstock.hardware.process import prepare_process

    prepare_process()
    import penstock

    penstock.prepare(
        source={"kind": "stdlib"},
        tokenizer={"train": True},
        data={"path": str(FOLDER / "dataset"), "sequence_length": LENGTH},
    )
    penstock.compile(
        model={"preset": "gpt2"},
        batch={"micro": MICRO},
        data={"sequence_length": LENGTH},
        precision={"compute": "bf16"},
        executable=str(FOLDER / "gpt2.penstock"),
    )


def run_apart(name: str, steps: int) -> dict:
    """One contender in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--steps", str(steps)]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        sys.exit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


def medians_of(runs: list[dict]) -> dict:
    """Of each figure, over the rounds."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def show(results: dict[str, list[dict]]) -> dict[str, dict]:
    """Print the table; the medians it is made of, by contender."""
    medians = {name: medians_of(runs) for name, runs in results.items() if runs}
    ours = medians.get(OURS)
    print("\n| contender | runs | tokens/s | ours is | peak memory | ours is |")
    print("|---|---|---|---|---|---|")
    for name, found in medians.items():
        if name == PRODUCTS:
            continue
        speed, memory = (
            f"{ours[key] / found[key]:.2f}×" if ours else ""
            for key in ("tokens_per_second", "memory_bytes")
        )
        print(
            f"| {name} | {len(results[name])} | {found['tokens_per_second']:,.0f} | {speed} | "
            f"{found['memory_bytes'] / 2**30:.2f} GiB | {memory} |"
        )
    show_shares(results.get(OURS, []), results.get(PRODUCTS, []))
    return medians


def show_shares(ours: list[dict], alone: list[dict]) -> None:
    """Print what share of the peak the steps reached, each round by itself."""
    for key, what in (("flops_per_second", "median"), ("best", "best")):
        peaks = [run[key] for run in alone]
        shares = [run["flops_per_second"] / peak for run, peak in zip(ours, peaks, strict=False)]
        if shares:
            print(
                f"\nshare of the {what} bf16 product beside it ({min(peaks) / 1e9:,.0f} to "
                f"{max(peaks) / 1e9:,.0f} GFLOP/s): {statistics.median(shares):.0%}; by round: "
                + ", ".join(f"{share:.0%}" for share in shares)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=CONTENDERS, help="run this contender here, once")
    parser.add_argument("--steps", type=int, default=7, help="of which two are left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--resume", action="store_true", help="keep the runs there are already")
    options = parser.parse_args()
    if options.steps <= WARMUP:
        parser.error(f"--steps must be more than the {WARMUP} left out")
    if options.one:
        print(json.dumps(CONTENDERS[options.one](options.steps)))
        return
    path = FOLDER / "training.json"
    results: dict[str, list[dict]] = {name: [] for name in options.contenders}
    if options.resume and path.exists():
        results |= json.loads(path.read_text())["runs"]
    else:
        prepare()
    for number in range(options.rounds):
        for name in options.contenders:
            if len(results[name]) > number:
                continue
            results[name].append(run_apart(name, options.steps))
            print(f"round {number + 1}: {name}: {results[name][-1]}", flush=True)
            path.write_text(json.dumps({"steps": options.steps, "runs": results}, indent=1))
    medians = show(results)
    value = {"steps": options.steps, "medians": medians, "runs": results}
    path.write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
