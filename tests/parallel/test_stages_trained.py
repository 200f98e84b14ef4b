"""Stages in processes of their own train what one process does, by every schedule."""

import dataclasses
from pathlib import Path

import pytest
import safetensors
import torch

import penstock
from penstock.checkpoint import list_checkpoints
from penstock.models.initialization import initialize
from penstock.models.resolve import resolve_architecture
from penstock.models.transformer import Transformer
from penstock.parallel.environment import Place
from penstock.parallel.mesh import coordinates
from penstock.parallel.stage import TABLE, Stage, layers_of_pieces, named_parameters
from penstock.training.metrics import read_metrics
from tests.parallel.test_replicas import STEPS, assert_close, figures, job, run_jobs, state

MODEL = {"preset": "gpt2-tiny", "dropout": 0.1, "layers": 4}
WAYS = ("none", "optimizer", "gradients", "weights")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")


def staged(dataset: Path, run: Path, schedule: str, **more: object) -> dict:
    plan = {"stages": 2, "schedule": schedule, **more.pop("plan", {})}
    return job(dataset, run, **{"model": MODEL, "plan": plan, **more})


@pytest.fixture(scope="module")
def alone(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    penstock.train(**{**job(dataset_folder, run), "model": MODEL})
    return run


def test_every_schedule_trains_what_one_process_does(
    alone: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    jobs = [staged(dataset_folder, tmp_path / name, name) for name in SCHEDULES]
    # Stages of other sizes; then a run that is handed on, to one process and to replicas.
    uneven = {"plan": {"stages": None, "layers_per_stage": [3, 1]}}
    jobs.append(staged(dataset_folder, tmp_path / "uneven", "1f1b", **uneven))
    short = {"train": {"steps": STEPS // 3}}
    jobs.append(staged(dataset_folder, tmp_path / "handed-on", "1f1b", **short))
    longer = {"train": {"steps": 2 * STEPS // 3}}
    jobs.append({**job(dataset_folder, tmp_path / "handed-on", **longer), "model": MODEL})
    run_jobs(jobs, tmp_path)
    for name in (*SCHEDULES, "uneven"):
        assert_close(tmp_path / name, alone)
        assert state(tmp_path / name).keys() == state(alone).keys()
        for key, tensor in state(alone).items():
            assert torch.allclose(state(tmp_path / name)[key], tensor, rtol=1e-3, atol=1e-5), key
    parts = list_checkpoints(tmp_path / "1f1b" / "checkpoints")[-1]
    assert (parts / "optimizer-00002-of-00002.safetensors").is_file()
    texts = [
        penstock.generate(run=run, generate={"prompt": "import ", "tokens": 8}).completions[0].text
        for run in (tmp_path / "interleaved", alone)
    ]
    assert texts[0] == texts[1]
    penstock.train(**{**job(dataset_folder, tmp_path / "handed-on"), "model": MODEL})
    assert figures(tmp_path / "handed-on")[-3:] == pytest.approx(figures(alone)[-3:], rel=1e-5)


def test_replicas_of_stages_train_what_one_process_does(
    alone: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    plan = {"plan": {"replicas": 2}}
    run_jobs([staged(dataset_folder, tmp_path / "mesh", "1f1b", **plan)], tmp_path, processes=4)
    assert_close(tmp_path / "mesh", alone)


def test_stages_run_through_kernels_and_are_exported_whole(
    tiny_executable: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    def values(run: str, **more: object) -> dict:
        made = job(dataset_folder, tmp_path / run, **more)
        given = {k: v for k, v in made.items() if k not in ("model", "precision", "compile")}
        return given | {"batch": {"size": 8}, "executable": str(tiny_executable)}

    penstock.train(**values("alone"))
    run_jobs([values("stages", plan={"stages": 2})], tmp_path)
    assert_close(tmp_path / "stages", tmp_path / "alone")
    for run in ("alone", "stages"):
        penstock.convert("checkpoint", run=tmp_path / run, out=tmp_path / f"{run}-exported")
    names = [tensor_names(tmp_path / f"{run}-exported") for run in ("alone", "stages")]
    assert names[0] == names[1] != []


def fifty(dataset: Path, run: Path, *, is_small: bool, **more: object) -> dict:
    """Fifty steps at a learning rate at which training is smooth, as `losses` says."""
    short = {"evaluate_every": 25, "steps": 50} if is_small else {"steps": 50}
    values = job(dataset, run, train=short, optimizer={"lr": 5e-4}, model=MODEL, **more)
    if is_small:
        small = {**MODEL, "hidden_size": 32, "heads": 2}
        data = {**values["data"], "sequence_length": 32}
        values |= {"model": small, "data": data, "checkpoint": {"every": None}}
    return values


@pytest.mark.slow
@pytest.mark.parametrize("is_small", [pytest.param(True, id="small"), False])
@pytest.mark.timeout(3600)
def test_fifty_steps_by_every_mesh_are_those_of_one_process(
    is_small: bool, dataset_folder: Path, tmp_path: Path
) -> None:
    # Small: as many micro-batches as have to be, since it is these that take the time.
    size, staged_micro, divided_micro = (4, 1, 2) if is_small else (8, 2, 2)

    def values(run: str, micro: int, **plan: object) -> dict:
        batch = {"micro": micro, "size": size}
        return fifty(dataset_folder, tmp_path / run, is_small=is_small, plan=plan, batch=batch)

    penstock.train(**values("alone", divided_micro))
    stages = {"layers_per_stage": [2, 2]}
    two = [values(name, staged_micro, schedule=name, **stages) for name in SCHEDULES]
    two += [values(way, divided_micro, shard=way) for way in WAYS]
    two.append(values("parts", 2 * divided_micro, tensor=2))
    run_jobs(two, tmp_path, timeout=1800)
    mesh = {**stages, "schedule": "1f1b", "replicas": 2}
    four = [values("mesh", staged_micro, **mesh)]
    if not is_small:
        four.append(values("divided mesh", staged_micro, **mesh, shard="weights"))
    run_jobs(four, tmp_path, processes=4, timeout=1800)
    expected = losses(tmp_path / "alone")
    assert len(expected) == 50 + (2 if is_small else 9)
    assert expected[49] < expected[0] - 0.1
    for done in (*two, *four):
        assert losses(Path(done["run"])) == pytest.approx(expected, rel=1e-5), done["run"]


def test_pieces_of_the_depth_make_up_the_model() -> None:
    architecture = dataclasses.replace(_tiny(), layers=5)
    pieces = layers_of_pieces([3, 2], 2)
    assert [list(piece) for piece in pieces] == [[0, 1], [2], [3], [4]]
    whole = Transformer(architecture)
    initialize(whole, 7)
    stages = [Stage(whole, pieces, index, 0.0) for index in range(4)]
    tokens = torch.arange(12).view(2, 6)
    x: torch.Tensor = tokens
    with torch.no_grad():
        for stage in stages:
            x = stage(x, tokens)
        expected = whole.token_losses(tokens, tokens)
    assert torch.equal(x, expected)
    names = [name for name, _ in named_parameters(stages)]
    assert sorted({*names}) == sorted(name for name, _ in whole.named_parameters())
    assert [name for name in names if names.count(name) > 1] == [TABLE, TABLE]


def test_replicas_stand_next_to_each_other() -> None:
    places = [coordinates(Place(rank=rank, size=6), 2) for rank in range(6)]
    assert places == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def losses(run: Path) -> list[float]:
    """Of training and validation. Not norms: a batch whose norm is ten times the others' magnifies
    the last bits of all steps before, in replicas as in stages.
    """
    records = read_metrics(run / "metrics.jsonl")
    return [r[name] for r in records for name in ("loss", "validation_loss") if name in r]


def tensor_names(folder: Path) -> list[str]:
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(file.keys())


def _tiny():
    from penstock.config.schema import ModelSection

    return resolve_architecture(ModelSection.model_validate({"preset": "gpt2-tiny"}), 512)
