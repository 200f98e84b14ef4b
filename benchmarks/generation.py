"""Generating with GPT-2 124M: Penstock from an executable against `transformers` and llama.cpp.

One prompt of 32 tokens and 128 more, and sixteen prompts of 8 to 64 tokens and 64 more. All run the
same weights, greedily, in a process of their own; rounds are interleaved and the medians compared.
Run `benchmarks/training.py` once before: it makes the dataset whose text the prompts are cut from,
and `make llama-cpp`, which compiles llama.cpp; without it that contender is left out.

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
LLAMA_CPP = FOLDER / "llama-cpp" / "bin" / "python"
JOBS = {"one prompt": ([32], 128), "sixteen prompts": ([*range(8, 68, 4), 64], 64)}
CONTENDERS = (
    "penstock bf16", "transformers bf16", "llama.cpp BF16", "penstock int8", "llama.cpp Q8_0",
)  # fmt: skip
PAIRS = (
    ("penstock bf16", "transformers bf16"), ("penstock bf16", "llama.cpp BF16"),
    ("penstock int8", "penstock bf16"), ("penstock int8", "llama.cpp Q8_0"),
)  # fmt: skip


def prompts(lengths: list[int]) -> list[list[int]]:
    """Token ids cut from the test split."""
    import numpy as np

    tokens = np.fromfile(FOLDER / "dataset" / "test.bin", np.uint16).astype(int)
    return [tokens[i * 1000 : i * 1000 + length].tolist() for i, length in enumerate(lengths)]


def executable(weights: str) -> Path:
    """File for weights in bf16 or int8."""
    return FOLDER / f"generate-{weights}.penstock"


def penstock(weights: str) -> dict:
    """`penstock generate` with an executable; the model is loaded once."""
    from penstock.hardware.process import prepare_process

    prepare_process()
    import torch

    from penstock import runs
    from penstock.config.load import as_config
    from penstock.data.tokenizer import Tokenizer

    config = as_config(
        executable=str(executable(weights)),
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
    read_seconds = engine._decoder._weights.numel() * statistics.median(times) / values.nbytes
    figures["share of the reading bandwidth"] = figures["one prompt"] * read_seconds
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


def llama_cpp(kind: str) -> dict:
    """llama.cpp through its own Python bindings, in their own environment."""
    jobs = {name: (prompts(lengths), count) for name, (lengths, count) in JOBS.items()}
    script = Path(__file__).with_name("llama_cpp_generation.py")
    command = [str(LLAMA_CPP), str(script), str(MODEL), str(FOLDER), kind]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def prepare() -> None:
    """Weights in the Hugging Face layout, and the executables."""
    from penstock.hardware.process import prepare_process

    prepare_process()
    import torch
    import transformers

    from penstock.api import compile as compile_executable

    if not MODEL.is_dir():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(eos_token_id=None))
        model.save_pretrained(MODEL)
    for weights in ("bf16", "int8"):
        compile_executable(
            mode="generate",
            model={"from": str(MODEL)},
            precision={"compute": "bf16", "weights": "int8" if weights == "int8" else None},
            generate={"batch": 16},
            data={"sequence_length": 256},
            executable=str(executable(weights)),
        )


def run_apart(name: str) -> dict | None:
    """One contender in a process of its own; None for a peer that fails on this machine."""
    command = [sys.executable, __file__, "--one", name]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode and name.startswith("penstock"):
        sys.exit(output.stderr)
    return None if output.returncode else json.loads(output.stdout.splitlines()[-1])


def show(medians: dict[str, dict[str, float]]) -> None:
    """Print the tables."""
    print("\n| job | contender | tokens/s |\n|---|---|---|")
    for job in JOBS:
        for name in medians:
            print(f"| {job} | {name} | {medians[name][job]:.1f} |")
    print("\n| job | | ratio |\n|---|---|---|")
    for job in JOBS:
        for ours, theirs in PAIRS:
            if ours in medians and theirs in medians:
                ratio = medians[ours][job] / medians[theirs][job]
                print(f"| {job} | {ours} to {theirs} | {ratio:.2f}× |")
    for name in ("penstock bf16", "penstock int8"):
        share = medians[name]["share of the reading bandwidth"]
        print(f"\n{name}, one prompt: {share:.0%} of the reading bandwidth measured beside it")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.one:
        program, kind = options.one.split()
        run = {"penstock": penstock, "llama.cpp": llama_cpp}.get(program)
        print(json.dumps(transformers_bf16() if run is None else run(kind)))
        return
    prepare()
    contenders = [name for name in CONTENDERS if LLAMA_CPP.exists() or "llama" not in name]
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    for number in range(options.rounds):
        for name in [*results]:
            found = run_apart(name)
            print(f"round {number + 1}: {name}: {found or 'fails here, left out'}", flush=True)
            if found is None:
                del results[name]
            else:
                results[name].append(found)
    medians = {
        name: {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        for name, runs in results.items()
    }
    show(medians)
    (FOLDER / "generation.json").write_text(
        json.dumps({"medians": medians, "runs": results}, indent=1)
    )


if __name__ == "__main__":
    main()
