"""What a failed save costs: itself, or where that is wanted the run."""

from pathlib import Path

import pytest

from penstock.checkpoint import list_checkpoints
from penstock.errors import CheckpointError
from penstock.parallel.environment import find_place
from penstock.parallel.world import World
from penstock.saving import AsyncSaver
from penstock.training.saves import Saves
from tests.test_checkpoint import make_state


def test_a_failed_save_is_said_once_and_counted_and_the_next_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("a file in the way")
    saver = AsyncSaver(folder, keep=1)
    saves = Saves(saver, World(find_place()), "continue")
    assert not saves.settle()
    saves.save(lambda: make_state(1), is_best=False, wait=False)
    while saver.failure() is None:
        pass
    saves.tell()
    saves.tell()
    assert saves.settle()
    assert not saves.settle()
    [line] = capfd.readouterr().err.splitlines()
    assert "could not be written" in line
    assert "training goes on" in line
    folder.unlink()
    saves.save(lambda: make_state(2), is_best=False, wait=False)
    assert not saves.settle()
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002"]
    saver.close()


def test_a_failed_save_stops_where_that_is_asked_for_and_the_last_one_always(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    saver = AsyncSaver(tmp_path / "checkpoints", keep=1)
    strict = Saves(saver, World(find_place()), "stop")
    strict.save(lambda: make_state(1), is_best=False, wait=False)
    with pytest.raises(CheckpointError, match="could not be written"):
        strict.settle()
    with pytest.raises(CheckpointError, match="could not be written"):
        Saves(saver, World(find_place()), "continue").save(
            lambda: make_state(1), is_best=False, wait=True
        )
    assert not capfd.readouterr().err
    saver.close()
