"""How long training stands still for a checkpoint, and what it costs until it is on the disk.

GPT-2 124M with AdamW, compiled, in one process. The stall is the time of `AsyncSaver.save`; what a
checkpoint costs in all is how much longer the steps are while it is written.

    python benchmarks/saving.py                 one micro-batch of 4 × 512 tokens a step
    python benchmarks/saving.py --size 16       four of them
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks" / "saving"
EVERY, STEPS = 4, 13


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4, help="sequences of a step")
    size = parser.parse_args().size
    from penstock.hardware.process import prepare_process

    prepare_process()
    import penstock
    from penstock.saving import AsyncSaver
    from penstock.training.metrics import read_metrics

    data = FOLDER / "dataset"
    penstock.prepare(
        source={"kind": "stdlib"},
        tokenizer={"train": True, "vocab_size": 1024},
        data={"path": str(data), "sequence_length": 512},
    )
    stalls: list[float] = []
    real = AsyncSaver.save

    def timed(self: AsyncSaver, *arguments: object, **more: object) -> None:
        started = time.perf_counter()
        real(self, *arguments, **more)
        if not more.get("wait"):
            stalls.append(time.perf_counter() - started)

    AsyncSaver.save = timed
    shutil.rmtree(FOLDER / "run", ignore_errors=True)
    penstock.train(
        model={"preset": "gpt2", "vocab_size": 50257},
        data={"path": str(data), "sequence_length": 512},
        batch={"micro": 4, "size": size},
        train={"steps": STEPS, "tensorboard": False, "report": False, "evaluate_sequences": 4},
        checkpoint={"every": EVERY, "keep": 1},
        run=str(FOLDER / "run"),
    )
    records = [r for r in read_metrics(FOLDER / "run" / "metrics.jsonl") if "loss" in r]
    seconds = {r["step"]: r["step_seconds"] for r in records}
    # A step after a checkpoint runs beside its writing; the one before the next does not.
    beside = [seconds[s] for s in seconds if s > EVERY and s % EVERY == 1]
    alone = [seconds[s] for s in seconds if s > 1 and s % EVERY == 0]
    step = statistics.median(alone)
    # The first save allocates its buffers.
    result = {
        "step_seconds": step,
        "first_stall_seconds": stalls[0],
        "stall_seconds": statistics.median(stalls[1:]),
        "stall_of_a_step": statistics.median(stalls[1:]) / step,
        "first_step_beside_writing": statistics.median(beside) / step,
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
