"""Bits that flip and files that are cut short, in every kind of file a run reads.

More of this: single checkpoints in `tests/test_checkpoint.py`, executables and forged signatures in
`tests/compiler/test_executable.py`, manifests of datasets in `tests/data/test_prepare.py`.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.checkpoint import CheckpointState, load_checkpoint, load_newest, save_checkpoint
from penstock.compiler.executable import Executable
from penstock.data.dataset import MANIFEST, Dataset
from penstock.errors import CheckpointError, UserError
from penstock.parallel.parts import Part
from penstock.saving import AsyncSaver
from tests.test_checkpoint import assert_equal, make_state

STEP_BYTES = 64 << 10
"""A bit of every so many bytes is flipped."""


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A bit flipped in every 64 KiB, each half cut off, all zero, nothing left."""
    for start in range(0, len(content), STEP_BYTES):
        position = min(start + STEP_BYTES // 2, len(content) - 1)
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        yield f"bit of byte {position}", bytes(flipped)
    yield "second half missing", content[: len(content) // 2]
    yield "last byte missing", content[:-1]
    yield "zeros", bytes(len(content))
    yield "empty", b""


def save_in_parts(folder: Path, state: CheckpointState, count: int) -> Path:
    """As that many processes save it, each its rows."""
    for index in [*range(1, count), 0]:
        rows = {
            name: tensor.chunk(count)[index].contiguous() for name, tensor in state.tensors.items()
        }
        part = Part(index, count, "token", 5.0)
        path = save_checkpoint(folder, CheckpointState(state.step, rows, state.values), part=part)
    return path


def even_state(step: int) -> CheckpointState:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        f"{kind}.{name}": torch.randn(64, 700, generator=generator)
        for kind, name in itertools.product(("master", "exp_avg"), ("a", "b"))
    }
    return CheckpointState(step, tensors, {"position": step})


def test_no_damage_to_any_file_of_a_divided_checkpoint_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path, even_state(1))
    newest = save_in_parts(tmp_path, even_state(2), 2)
    assert_equal(load_newest(tmp_path), even_state(2))
    tried = 0
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for what, damaged in damages(content):
            if damaged == content:
                continue
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load_checkpoint(newest)
            assert_equal(load_newest(tmp_path), even_state(1))
            assert "\n" not in what
            tried += 1
        file.write_bytes(content)
        file.rename(file.with_suffix(".gone"))
        assert_equal(load_newest(tmp_path), even_state(1))
        file.with_suffix(".gone").rename(file)
    assert tried > 30
    assert "using the checkpoint before it" in capfd.readouterr().err
    assert_equal(load_newest(tmp_path), even_state(2))


def test_a_process_may_save_a_step_again_before_the_others_have_saved_it(tmp_path: Path) -> None:
    first, second = (AsyncSaver(tmp_path, 1, Part(index, 2, "token", 5.0)) for index in (0, 1))
    for saver, index in ((second, 1), (second, 1), (first, 0), (first, 0)):
        rows = {n: t.chunk(2)[index].contiguous() for n, t in even_state(4).tensors.items()}
        saver.save(CheckpointState(4, rows, {"position": 4}), wait=True)
    assert_equal(load_newest(tmp_path), even_state(4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    first.close()
    second.close()


def test_swapped_parts_and_the_manifest_of_another_step_are_damage(tmp_path: Path) -> None:
    older = save_in_parts(tmp_path, even_state(1), 2)
    newest = save_in_parts(tmp_path, even_state(2), 2)
    one, two = (newest / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    assert_equal(load_newest(tmp_path), even_state(1))
    one.write_bytes(contents[0])
    two.write_bytes(contents[1])
    shutil.copy(newest / "manifest.json", tmp_path / "kept")
    shutil.copy(older / "manifest.json", newest / "manifest.json")
    assert_equal(load_newest(tmp_path), even_state(1))
    shutil.copy(tmp_path / "kept", newest / "manifest.json")
    assert_equal(load_newest(tmp_path), even_state(2))


def test_no_damage_to_an_executable_is_run(tiny_executable: Path, tmp_path: Path) -> None:
    content, file = tiny_executable.read_bytes(), tmp_path / "damaged.penstock"
    some = list(damages(content))
    for what, damaged in some[:: max(1, len(some) // 40)] + some[-4:]:
        file.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            Executable.open(file, []).kernels()
        assert "\n" not in str(caught.value), what


def test_no_damage_to_a_dataset_is_trained_on(dataset_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(dataset_folder, copy)
    named = json.loads((copy / MANIFEST).read_bytes())["files"]
    tried = 0
    for name in named:
        file = copy / name
        content = file.read_bytes()
        for what, damaged in damages(content):
            if damaged == content:
                continue
            file.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                Dataset.open(copy)
            assert "\n" not in str(caught.value), what
            tried += 1
        file.write_bytes(content)
    assert tried >= 4 * len(named)
    Dataset.open(copy)


def test_a_state_of_other_numbers_is_not_the_same(tmp_path: Path) -> None:
    """What the tests above compare with can tell states apart."""
    save_checkpoint(tmp_path, make_state(1))
    with pytest.raises(AssertionError):
        assert_equal(load_newest(tmp_path), make_state(2))
