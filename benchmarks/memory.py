"""Predicted against measured peak memory, run by run, each in a process of its own.

Measured is the resident set's high-water mark as `summary.json` records it, after two optimizer
steps from compiled kernels. Shapes are compiled once and cached. Writes
build/benchmarks/memory/memory.json after each case.

    python benchmarks/memory.py                    all cases: an hour on two cores
    python benchmarks/memory.py --resume           go on where a run was stopped
    python benchmarks/memory.py --list
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks" / "memory"
STEPS = 2
"""Optimizer steps of a case; the heap has its full size in the second."""
CASES = [
    ("gpt2", 1, 256, 1, "selective", False),
    ("gpt2", 4, 512, 1, "selective", False),
    ("gpt2", 4, 512, 1, "blocks", False),
    ("gpt2", 4, 512, 1, "none", False),
    ("gpt2", 4, 512, 4, "selective", False),
    ("gpt2", 4, 512, 1, "selective", True),
    ("gpt2", 8, 256, 1, "selective", False),
    ("gpt2", 8, 256, 1, "none", False),
    ("gpt2", 1, 1024, 1, "selective", False),
    ("gpt2-medium", 1, 256, 1, "selective", False),
    ("gpt2-medium", 1, 256, 1, "blocks", False),
    ("gpt2-medium", 1, 256, 1, "none", False),
    ("gpt2-medium", 1, 1024, 1, "selective", False),
    ("gpt2-medium", 1, 1024, 1, "blocks", False),
    ("gpt2-medium", 1, 1024, 1, "none", False),
    ("gpt2", 8, 1024, 1, "selective", False),
    ("gpt2", 8, 1024, 1, "blocks", False),
    ("gpt2", 8, 1024, 1, "none", False),
    ("gpt2-medium", 4, 512, 1, "selective", False),
    ("gpt2-medium", 8, 512, 1, "blocks", False),
]
"""(preset, micro, sequence length, micro-batches, recompute, checkpoints while training), quick ones
first."""


def penstock(*words: str) -> None:
    command = [sys.executable, "-m", "penstock", *words, "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode:
        sys.exit(result.stderr)


def dataset(length: int) -> Path:
    path = FOLDER / f"dataset-{length}"
    if path.exists():
        return path
    penstock(
        "prepare", "source.kind=stdlib", "tokenizer.train=true", "tokenizer.vocab_size=1024",
        f"data.sequence_length={length}", f"data.path={path}",
    )  # fmt: skip
    return path


def measure(case: tuple[str, int, int, int, str, bool]) -> dict[str, object]:
    preset, micro, length, accumulation, recompute, saves = case
    run = FOLDER / "run"
    subprocess.run(["rm", "-rf", str(run)], check=True)
    penstock(
        "train", f"model.preset={preset}", "model.vocab_size=50257", f"batch.micro={micro}",
        f"batch.size={micro * accumulation}", f"data.sequence_length={length}",
        f"data.path={dataset(length)}", f"plan.recompute={recompute}", f"run={run}",
        f"train.steps={STEPS}", f"checkpoint.every={1 if saves else 'null'}", "train.report=false",
        "train.tensorboard=false", "train.evaluate_sequences=1",
    )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    predicted, measured = summary["predicted_memory_bytes"], summary["memory_bytes"]
    assert summary["compiled"]
    return {
        "case": case,
        "kinds": summary["plan"]["memory"],
        "predicted": predicted,
        "measured": measured,
        "difference": predicted / measured - 1,
    }


def show(found: list[dict[str, object]]) -> None:
    print("| model | batch | recompute | saving | predicted | measured | difference |")
    print("|---|---|---|---|---|---|---|")
    for row in found:
        preset, micro, length, accumulation, recompute, saves = row["case"]
        batch = (
            f"{accumulation} × {micro} × {length}" if accumulation > 1 else f"{micro} × {length}"
        )
        sizes = (f"{row[name] / 2**20:,.0f} MiB" for name in ("predicted", "measured"))
        cells = [preset, batch, recompute, "yes" if saves else "no", *sizes]
        print(f"| {' | '.join(cells)} | {row['difference']:+.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="only show the cases")
    parser.add_argument("--resume", action="store_true", help="keep what memory.json holds")
    parser.add_argument("--cases", type=int, nargs="+", help="these alone, by number from 0")
    options = parser.parse_args()
    chosen = CASES if options.cases is None else [CASES[number] for number in options.cases]
    path = FOLDER / "memory.json"
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if options.resume and path.exists() else []
    done = {tuple(row["case"]) for row in found}
    for case in chosen:
        if options.list:
            print(CASES.index(case), case)
            continue
        if case in done:
            continue
        found.append(measure(case))
        print(case, f"{found[-1]['difference']:+.1%}", flush=True)
        path.write_text(json.dumps(found, indent=1))
    if found:
        show(found)


if __name__ == "__main__":
    main()
