"""Every family, whole and by adapters, eagerly and by region graphs, resumed at every kind of moment.

Moments are after the first step, after a validation, where an epoch ends inside a batch and where
it ends with one. Kills whenever they come are in `test_resume.py`.
"""

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import penstock
from penstock.checkpoint import (
    CheckpointState,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from penstock.training.metrics import read_metrics

PRESETS = {
    "gpt2": "gpt2-tiny",
    "gpt_neox": "pythia-tiny",
    "gptj": "gpt-j-tiny",
    "llama": "llama-tiny",
    "bert": "bert-tiny",
}
STEPS = 8
EPOCH, BATCH = 20, 8
"""Samples: of an epoch, of a step. Epochs end inside the third step and with the fifth."""
MOMENTS = {"first": 1, "validation": 2, "inside": 3, "edge": 5}
"""Steps after which a run is taken up again."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models so small lose time to a second one, most of all where others want the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WORDS = [
    "the",
    "run",
    "goes",
    "on",
    "from",
    "where",
    "it",
    "stood",
    "with",
    "all",
    "its",
    "numbers",
    "and",
    "no",
    "other",
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Twenty lines, a sample each, for causal and (True) for masked models."""
    folder, chance = tmp_path_factory.mktemp("twenty"), random.Random(0)
    rows = [" ".join(chance.choices(WORDS, k=30)) for _ in range(EPOCH)]
    (folder / "lines.txt").write_text("\n".join(rows), encoding="utf-8")
    kinds = {False: {}, True: {"kind": "bert"}}
    for is_masked, kind in kinds.items():
        penstock.prepare(
            source={"path": str(folder / "lines.txt"), "documents": "line"},
            tokenizer={"train": True, "vocab_size": 300, **kind},
            data={
                "path": str(folder / str(is_masked)),
                "sequence_length": 32,
                "packing": "single::truncate_right",
                "splits": [1, 0, 0],
            },
        )
    return {is_masked: folder / str(is_masked) for is_masked in kinds}


def job(family: str, datasets: dict[bool, Path], run: Path, *, lora: bool, graphs: bool) -> dict:
    data = {"path": str(datasets[family == "bert"]), "validation_split": "train"}
    return {
        "model": {"preset": PRESETS[family], "dropout": 0.1},
        "data": {**data, "sequence_length": 32},
        "batch": {"micro": 4, "size": BATCH},
        "precision": {"compute": "bf16" if graphs else "fp32"},
        # Regions' graphs as they are lowered, run operator by operator.
        "compile": {"toolchain": "eager"} if graphs else {"mode": "off"},
        "optimizer": {"lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": 2},
        "train": {
            "steps": STEPS, "evaluate_every": 2, "evaluate_sequences": 4,
            "tensorboard": False, "report": False, "log_samples": True,
        },
        "checkpoint": {"every": 1, "keep": STEPS},
        "run": str(run),
        **({"lora": {"rank": 4, "targets": ["all-linear"], "dropout": 0.1}} if lora else {}),
    }  # fmt: skip


def taken_up(whole: Path, run: Path, step: int) -> None:
    """The run as a kill after that step left it: with no later checkpoint, its logs ahead of it."""
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    for path in list_checkpoints(run / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def assert_same_bits(run: Path, whole: Path) -> None:
    """Losses, norms, validation losses, learning rates, weights, moments, counts, samples."""
    for record, expected in zip(figures(run), figures(whole), strict=True):
        assert record == expected
    found, kept = (load_checkpoint(list_checkpoints(r / "checkpoints")[-1]) for r in (run, whole))
    assert found.step == kept.step == STEPS
    assert found.tensors.keys() == kept.tensors.keys()
    assert all(torch.equal(found.tensors[name], kept.tensors[name]) for name in kept.tensors)
    for values in (found.values, kept.values):
        values["totals"].pop("seconds")
    assert found.values == kept.values
    log = Path("samples", "rank-00000.jsonl")
    assert (run / log).read_bytes() == (whole / log).read_bytes()


def figures(run: Path) -> list[dict[str, float]]:
    names = ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss")
    records = read_metrics(run / "metrics.jsonl")
    return [{name: record[name] for name in names if name in record} for record in records]


CASES = list(itertools.product(PRESETS, (False, True), (False, True)))
SAMPLE = [(family, n % 2 == 0, False) for n, family in enumerate(PRESETS)]
"""Each family once. GPT-2 by compiled kernels is in `test_resume.py`."""


@pytest.mark.parametrize(
    ("family", "lora", "graphs"),
    [pytest.param(*c, marks=() if c in SAMPLE else pytest.mark.slow) for c in CASES],
)
def test_taken_up_at_any_moment_no_bit_is_another(
    family: str, lora: bool, graphs: bool, datasets: dict[bool, Path], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    penstock.train(**job(family, datasets, whole, lora=lora, graphs=graphs))
    assert len(figures(whole)) == STEPS + STEPS // 2
    assert len(list_checkpoints(whole / "checkpoints")) == STEPS
    for name, step in MOMENTS.items():
        run = tmp_path / name
        taken_up(whole, run, step)
        penstock.train(**job(family, datasets, run, lora=lora, graphs=graphs))
        assert_same_bits(run, whole)


def test_a_state_that_lacks_a_moment_of_the_optimizer_is_seen(
    datasets: dict[bool, Path], tmp_path: Path
) -> None:
    """What the test above compares can tell runs apart: one whose moments were lost trains on."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    penstock.train(**job("gpt2", datasets, whole, lora=False, graphs=False))
    taken_up(whole, run, 3)
    state = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    tensors = {n: t if n.startswith("master.") else t * 0 for n, t in state.tensors.items()}
    save_checkpoint(run / "checkpoints", CheckpointState(state.step, tensors, state.values))
    penstock.train(**job("gpt2", datasets, run, lora=False, graphs=False))
    with pytest.raises(AssertionError):
        assert_same_bits(run, whole)
