"""Generating with GPT-2 124M in bf16: Penstock from an executable against `transformers` generate.

One prompt of 32 tokens and 128 more, and sixteen prompts of 8 to 64 tokens and 64 more. Both run the
same weights, greedily, in a process of their own; rounds are interleaved and the medians compared.
Run `benchmarks/training.py` once before: it makes the dataset whose text the prompts are cut from.

    python benchmarks/generation.py --rounds 5
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
MODEL = FOLDER / "gpt2-weights"
EXECUTABLE = FOLDER / "generate.penstock"
JOBS = {"one prompt": ([32], 128), "sixteen prompts": ([*range(8, 68, 4), 64], 64)}
CONTENDERS = ("penstock bf16", "transformers bf16")


def prompts(lengths: list[int]) -> list[list[int]]:
    """Token ids cut from the test split."""
    import numpy as np

    tokens = np.fromfile(FOLDER / "dataset" / "test.bin", np.uint16).astype(int)
    return [tokens[i * 1000 : i * 1000 + length].tolist() for i, length in enumerate(lengths)]


def penstock_bf16() -> dict:
    """`penstock generate` with an executable; the model is loaded once."""
    from penstock.hardware.process import prepare_process

    prepare_process()
    import torch

    from penstock import runs
    from penstock.config.load import as_config
    from penstock.data.tokenizer import Tokenizer

    config = as_config(
        executable=str(EXECUTABLE),
        model={"from": str(MODEL)},
        tokenizer={"from": str(FOLDER / "dataset" / "tokenizer.json")},
    )
    engine = runs.open_engine(config)
    tokenizer = Tokenizer.load(FOLDER / "dataset" / "tokenizer.json")
    figures = {}
    for name, (lengths, count) in JOBS.items():
        section = config.generate.model_copy(update={"tokens": count, "batch": 16})
        texts = [tokenizer.decode(ids) for ids in prompts(lengths)]
        engine.generate(texts, section.model_copy(update={"tokens": 2}), 0)
        started = time.perf_counter()
        completions = engine.generate(texts, section, 0)
        seconds = time.perf_counter() - started
        figures[name] = sum(c.tokens for c in completions) / seconds
    values = torch.ones(1 << 26)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - started)
    figures["read bytes per second"] = values.numel() * 4 / statistics.median(times)
    figures["weight bytes"] = 2 * (sum(p.numel() for p in engine._model.parameters()) - 1024 * 768)
    return figures


def transformers_bf16() -> dict:
    """`model.generate`, as its documentation shows it, padded on the left."""
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(MODEL, dtype=torch.bfloat16)
    model.eval()
    figures = {}
    for name, (lengths, count) in JOBS.items():
        rows = prompts(lengths)
        longest = max(lengths)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, max_new_tokens=2, **options)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        figures[name] = len(rows) * count / (time.perf_counter() - started)
    return figures


def prepare() -> None:
    """Weights in the Hugging Face layout, and the executable."""
    from penstock.hardware.process import prepare_process

    prepare_process()
    import torch
    import transformers

    import penstock

    if not MODEL.is_dir():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(eos_token_id=None))
        model.save_pretrained(MODEL)
    penstock.compile(
        mode="generate",
        model={"from": str(MODEL)},
        precision={"compute": "bf16"},
        generate={"batch": 16},
        data={"sequence_length": 256},
        executable=str(EXECUTABLE),
    )


def run_apart(name: str) -> dict:
    """One contender in a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        sys.exit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.one:
        run = penstock_bf16 if options.one.startswith("penstock") else transformers_bf16
        print(json.dumps(run()))
        return
    prepare()
    results: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for number in range(options.rounds):
        for name in CONTENDERS:
            results[name].append(run_apart(name))
            print(f"round {number + 1}: {name}: {results[name][-1]}", flush=True)
    medians = {
        name: {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        for name, runs in results.items()
    }
    ours, theirs = (medians[name] for name in CONTENDERS)
    print("\n| | Penstock, tokens/s | transformers, tokens/s | ratio |\n|---|---|---|---|")
    for job in JOBS:
        print(f"| {job} | {ours[job]:.1f} | {theirs[job]:.1f} | {ours[job] / theirs[job]:.2f}× |")
    used = ours["one prompt"] * ours["weight bytes"] / ours["read bytes per second"]
    print(f"\nshare of the measured reading bandwidth, one prompt: {used:.0%}")
    (FOLDER / "generation.json").write_text(
        json.dumps({"medians": medians, "runs": results}, indent=1)
    )


if __name__ == "__main__":
    main()
