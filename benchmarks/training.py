"""Whole training steps of GPT-2 124M, 4 × 512 tokens: Penstock against `transformers` Trainer.

Every contender runs in a process of its own, as its users run it; rounds are interleaved and the
medians compared. Prints a table and writes build/benchmarks/training.json.

    make bench                     three rounds
    python benchmarks/training.py --rounds 1 --steps 6
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks"
MICRO, LENGTH, WARMUP = 4, 512, 2
CONTENDERS = ("penstock bf16", "trainer fp32", "trainer bf16")


def penstock_bf16(steps: int) -> dict:
    """`penstock train` from an executable."""
    import shutil

    from penstock.hardware.process import prepare_process

    prepare_process()
    import penstock

    run = FOLDER / "run"
    shutil.rmtree(run, ignore_errors=True)
    values = penstock.train(
        executable=str(FOLDER / "gpt2.penstock"),
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
    return {
        "tokens_per_second": values["throughput"]["tokens_per_second"],
        "memory_bytes": values["memory_bytes"],
        "share_of_bf16_peak": values["throughput"]["mfu"],
    }


def trainer(steps: int, *, bf16: bool) -> dict:
    """`transformers.Trainer` with its defaults, on the same tokens."""
    import numpy as np
    import torch
    import transformers

    tokens = np.fromfile(FOLDER / "dataset" / "train.bin", np.uint16).astype(np.int64)

    class Blocks(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(tokens) // LENGTH

        def __getitem__(self, index: int) -> dict:
            block = torch.from_numpy(tokens[index * LENGTH : (index + 1) * LENGTH])
            return {"input_ids": block, "labels": block}

    class Clock(transformers.TrainerCallback):
        times: list[float] = []

        def on_step_end(self, *arguments: object, **more: object) -> None:
            self.times.append(time.perf_counter())

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
    config = transformers.GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    clock = Clock()
    transformers.Trainer(model, arguments, train_dataset=Blocks(), callbacks=[clock]).train()
    seconds = (clock.times[-1] - clock.times[WARMUP - 1]) / (steps - WARMUP)
    return {
        "tokens_per_second": MICRO * LENGTH / seconds,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.one == "penstock bf16":
        print(json.dumps(penstock_bf16(options.steps)))
        return
    if options.one:
        print(json.dumps(trainer(options.steps, bf16=options.one.endswith("bf16"))))
        return
    prepare()
    results: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for number in range(options.rounds):
        for name in CONTENDERS:
            results[name].append(run_apart(name, options.steps))
            print(f"round {number + 1}: {name}: {results[name][-1]}", flush=True)
    medians = {
        name: {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        for name, runs in results.items()
    }
    ours = medians["penstock bf16"]
    print("\n| contender | tokens/s | ours is | peak memory | ours is |\n|---|---|---|---|---|")
    for name, figures in medians.items():
        speed = ours["tokens_per_second"] / figures["tokens_per_second"]
        memory = ours["memory_bytes"] / figures["memory_bytes"]
        print(
            f"| {name} | {figures['tokens_per_second']:,.0f} | {speed:.2f}× | "
            f"{figures['memory_bytes'] / 2**30:.2f} GiB | {memory:.2f}× |"
        )
    print(f"\nshare of the measured bf16 peak: {ours['share_of_bf16_peak']:.0%}")
    (FOLDER / "training.json").write_text(
        json.dumps({"medians": medians, "runs": results}, indent=1)
    )


if __name__ == "__main__":
    main()
