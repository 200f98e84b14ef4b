"""Sequences of like length in a step: every one once an epoch, cut short, resumed to the bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import penstock
from penstock.checkpoint import list_checkpoints, load_checkpoint
from penstock.cli import main
from penstock.data.dataset import Dataset
from penstock.data.grouping import GroupedSamples
from penstock.data.loader import Loader
from penstock.data.samples import SplitSamples
from penstock.training.metrics import read_metrics

BATCH, LENGTH = 4, 48


def samples(dataset: Path) -> GroupedSamples:
    split = Dataset.open(dataset).split("train")
    return GroupedSamples(SplitSamples(split, LENGTH, seed=3), BATCH, 3)


def test_an_epoch_has_every_sequence_once_and_neighbours_are_alike(lines: Path) -> None:
    grouped = samples(lines)
    split = Dataset.open(lines).split("train")
    orders = [grouped._indices(epoch * grouped.count, grouped.count) for epoch in (0, 1)]
    assert grouped.count > 50 * BATCH  # more than a window
    for order in orders:
        assert sorted(order) == list(range(grouped.count))
        lengths = [split.length(index, LENGTH) for index in order]
        steps = [lengths[i : i + BATCH] for i in range(0, len(lengths) - BATCH, BATCH)]
        assert np.mean([max(step) - min(step) for step in steps]) < 2
        waves = np.array([np.mean(step) for step in steps[:50]])
        assert abs(np.corrcoef(waves[1:], waves[:-1])[0, 1]) < 0.4  # no order of lengths
    assert orders[0] != orders[1]
    # A pure function of the position, however it is asked.
    assert [grouped._indices(i, 1)[0] for i in range(40, 60)] == orders[0][40:60]


def test_steps_are_cut_after_their_longest_sequence_and_lose_nothing(lines: Path) -> None:
    cut = Loader(samples(lines), sequence_length=LENGTH, batch_size=BATCH, micro=2)
    halves = [
        Loader(samples(lines), sequence_length=LENGTH, batch_size=BATCH, micro=2, share=(i, 2))
        for i in (0, 1)
    ]
    steps = cut.steps(0)
    lengths = set()
    for position in range(0, 80, BATCH):
        rows = samples(lines).rows(position, BATCH)
        longest = max(row.length for row in rows)
        lengths.add(longest)
        loaded = next(steps)
        assert loaded.tokens == BATCH * longest
        assert [batch.tokens.shape for batch in loaded.batches] == [(2, longest)] * 2
        weights = torch.cat([batch.loss_weights for batch in loaded.batches])
        assert weights.sum() == sum(float(row.weights.sum()) for row in rows)
        parts = [batch for half in halves for batch in half.micro_batches(position)]
        for mine, theirs in zip(loaded.batches, parts, strict=True):
            assert torch.equal(mine.tokens, theirs.tokens)
    steps.close()
    assert len(lengths) > 5


def job(dataset: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"preset": "gpt2-tiny"},
        "data": {"path": str(dataset), "sequence_length": LENGTH, "group_by_length": True},
        "batch": {"micro": 2, "size": BATCH},
        "compile": {"mode": "off"},
        "precision": {"compute": "fp32"},
        "train": {"steps": 8, "report": False, "tensorboard": False},
        "checkpoint": {"every": 4},
        "run": str(run),
        **changes,
    }


def test_a_stopped_run_goes_on_with_the_same_bits(lines: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("whole", "again")]
    for run in runs:
        penstock.train(**job(lines, run))
    shutil.rmtree(list_checkpoints(runs[1] / "checkpoints")[-1])
    penstock.train(**job(lines, runs[1]))
    one, two = (load_checkpoint(list_checkpoints(r / "checkpoints")[-1]).tensors for r in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)
    figures = [[(x["loss"], x["tokens"]) for x in read_metrics(r / "metrics.jsonl") if "loss" in x]
               for r in runs]  # fmt: skip
    assert figures[0] == figures[1]
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert summary["tokens"] == figures[0][-1][1] < 8 * BATCH * LENGTH


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["compile.mode=auto"], "kernels take batches of one length"),
        (["data.path={full}"], "with packing=full all sequences are equally long"),
        (["data.path=null", "data.mixture=[{lines},{full}]"], "a mixture or a stream"),
    ],
)
def test_what_cannot_be_grouped_is_told_in_one_line(
    changes: list[str],
    told: str,
    lines: Path,
    dataset_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "mixture" in "".join(changes):
        other = tmp_path / "other"
        shutil.copytree(lines, other)
    else:
        other = dataset_folder
    words = [f"data.path={lines}", "model.preset=gpt2-tiny", "train.steps=1", f"run={tmp_path}/r"]
    words += ["compile.mode=off", f"data.sequence_length={LENGTH}", "data.group_by_length=true"]
    words += [change.format(full=other, lines=lines) for change in changes]
    assert main(["train", *words]) == 2
    lines_told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("penstock:")]
    assert len(lines_told) == 1
    assert told in lines_told[0]
