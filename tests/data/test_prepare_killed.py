"""`prepare` killed again and again in the middle: the files are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from penstock.data.dataset import Dataset


@pytest.mark.slow
def test_kill_9_loses_no_document_and_doubles_none(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    words = np.array(["pipe", "flow", "turbine", "water", "gate", "valve", "head", "naïve"])
    lines = [
        json.dumps({"text": f"{i} " + " ".join(generator.choice(words, 200))}) for i in range(8000)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))

    def command(out: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "penstock", "prepare", "source.kind=jsonl"),
            *(f"source.path={tmp_path / 'in.jsonl'}", "tokenizer.train=true"),
            *("tokenizer.vocab_size=300", f"data.path={out}", "clean.exact_duplicates=true"),
            *("prepare.workers=2", "prepare.shard_bytes=200000"),
        ]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    kills = 0
    for wait in (1.0, 2.0, 3.0, 4.0, 6.0):
        process = subprocess.Popen(
            command(tmp_path / "killed"),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(wait)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes(), path.name
    splits = Dataset.open(tmp_path / "killed").manifest["splits"]
    assert sum(facts["documents"] for facts in splits.values()) == 8000
