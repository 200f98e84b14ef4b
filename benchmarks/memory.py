"""Predicted against measured peak memory, run by run, each in a process of its own.

Measured is the resident set's high-water mark as `summary.json` records it, after three optimizer
steps from compiled kernels. Shapes are compiled once and cached; `--list` only shows the cases.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks" / "memory"
CASES = [
    ("gpt2", 1, 256, 1, "none", False),
    ("gpt2", 8, 256, 1, "none", False),
    ("gpt2", 2, 512, 1, "none", False),
    ("gpt2", 2, 512, 4, "none", False),
    ("gpt2", 2, 512, 1, "blocks", False),
    ("gpt2", 2, 512, 1, "none", True),
    ("gpt2", 1, 1024, 1, "none", False),
    ("gpt2", 8, 1024, 1, "none", False),
    ("gpt2-medium", 1, 256, 1, "none", False),
    ("gpt2-medium", 4, 512, 1, "none", False),
    ("gpt2-medium", 4, 512, 1, "blocks", False),
    ("gpt2-medium", 1, 1024, 1, "none", True),
]
"""(preset, micro, sequence length, micro-batches, recompute, checkpoints while training)."""


def penstock(*words: str) -> None:
    command = [sys.executable, "-m", "penstock", *words, "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode:
        sys.exit(result.stderr)


def dataset(length: int) -> Path:
    path = FOLDER / f"dataset-{length}"
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
        "train.steps=3", f"checkpoint.every={1 if saves else 'null'}", "train.report=false",
        "train.tensorboard=false", "train.evaluate_sequences=8",
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
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = []
    for case in CASES:
        if "--list" in sys.argv:
            print(case)
            continue
        found.append(measure(case))
        print(case, f"{found[-1]['difference']:+.1%}", flush=True)
        (FOLDER / "memory.json").write_text(json.dumps(found, indent=1))
    show(found)


if __name__ == "__main__":
    main()
