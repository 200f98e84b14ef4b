"""Process start to the end of the first training step: an executable against torch.compile.

GPT-2 124M, 4 × 512 tokens, bf16. torch.compile starts cold, with an empty cache folder, as on a
new machine. Run `benchmarks/training.py` once before: it makes the dataset and the executable.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks"
ROUNDS = 2

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

THEIRS = """
import time, torch, transformers
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_pdrop=0., embd_pdrop=0., resid_pdrop=0.))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
compiled = torch.compile(model)
tokens = torch.randint(0, 50257, (4, 512))
with torch.autocast("cpu", torch.bfloat16):
    loss = compiled(tokens, labels=tokens).loss
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print(time.time(), flush=True)
"""


def seconds(code: str, *arguments: str, **environment: str) -> float:
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
    return float(output.stdout.split()[-1]) - started


def main() -> None:
    ours, theirs = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as scratch:
            ours.append(seconds(OURS, str(FOLDER), f"{scratch}/run"))
            theirs.append(seconds(THEIRS, TORCHINDUCTOR_CACHE_DIR=f"{scratch}/inductor"))
        print(f"executable {ours[-1]:.1f} s, torch.compile {theirs[-1]:.1f} s", flush=True)
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"first step {ratio:.1f}× sooner from the executable")
    (FOLDER / "startup.json").write_text(json.dumps({"ours": ours, "torch_compile": theirs}))


if __name__ == "__main__":
    main()
