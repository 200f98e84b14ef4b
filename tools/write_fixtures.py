"""Write tests/fixtures/VERSION: a small dataset and a run as this version leaves them.

Run it once for each release, and keep what it wrote for good: `tests/test_compatibility.py` reads
every version's with the code of today.
"""

import os
import shutil
import tempfile
from pathlib import Path

import penstock
from penstock.training.run_folder import RunFolder

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(1, 30) for m in range(1, 20))
"""Something a tokenizer of few words can be made for."""
SAVED, STEPS = 4, 8
"""The checkpoint kept is of step 4; the losses up to step 8 are recorded."""


def main() -> None:
    """Refuses to write over a version's files."""
    target = FIXTURES / penstock.__version__
    if target.exists():
        raise SystemExit(f"{target} is there already: what a version wrote does not change")
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        # Relative paths: where this was written is nobody's business.
        os.chdir(folder)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        penstock.prepare(
            source={"path": "text.txt"},
            tokenizer={"train": True, "vocab_size": 280},
            data={"path": "dataset", "sequence_length": 16},
        )
        for steps in (SAVED, STEPS):
            penstock.train(
                model={
                    "family": "gpt2",
                    "layers": 1,
                    "hidden_size": 8,
                    "heads": 2,
                    "max_positions": 16,
                    "dropout": 0.1,
                },
                data={"path": "dataset", "sequence_length": 16},
                batch={"micro": 2, "size": 4},
                precision={"compute": "fp32"},
                compile={"mode": "off"},
                optimizer={"lr": 1e-2},
                schedule={"name": "constant", "warmup": 2},
                train={"steps": steps, "tensorboard": False, "report": False},
                run="run",
            )
            if steps == SAVED:
                shutil.copytree("run", "kept")
        run = RunFolder(Path("run"))
        shutil.copytree("dataset", target / "dataset")
        shutil.copytree("kept/checkpoints", target / "run" / "checkpoints")
        for file in (run.metrics, run.config, run.plan, run.tokenizer):
            shutil.copy(file, target / "run" / file.name)


if __name__ == "__main__":
    main()
