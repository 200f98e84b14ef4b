"""Whatever happens to the disk or the process, a whole checkpoint is there and is found."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock.checkpoint
import penstock.saving
from penstock.checkpoint import (
    CheckpointState,
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from penstock.errors import CheckpointError
from penstock.saving import AsyncSaver

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def make_state(step: int, size: int = 500) -> CheckpointState:
    generator = torch.Generator().manual_seed(step)
    return CheckpointState(
        step=step,
        tensors={
            "master.blocks.0.weight": torch.randn(size, 3, generator=generator),
            "master.bias": torch.randn(7, generator=generator),
            "exp_avg.blocks.0.weight": torch.randn(size, 3, generator=generator),
            "exp_avg.bias": torch.zeros(7),
        },
        values={"position": step * 8, "guard": {"sum": 0.1 * step}, "loss": 1 / 3},
    )


def assert_equal(loaded: CheckpointState | None, expected: CheckpointState) -> None:
    assert loaded is not None
    assert loaded.step == expected.step
    assert loaded.values == expected.values
    assert loaded.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor), name


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    state = make_state(100)
    path = save_checkpoint(tmp_path / "checkpoints", state)
    assert path.name == "step-00000100"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert_equal(load_checkpoint(path), state)
    assert_equal(load_newest(path.parent), state)


def test_weights_lie_in_a_file_of_their_own_under_the_parameters_names(tmp_path: Path) -> None:
    state = make_state(1)
    path = save_checkpoint(tmp_path, state)
    weights = safetensors.torch.load_file(path / "model.safetensors")
    assert weights.keys() == {"blocks.0.weight", "bias"}
    (path / "optimizer.safetensors").unlink()
    loaded = load_checkpoint(path, weights_only=True)
    assert loaded.tensors.keys() == {"master.blocks.0.weight", "master.bias"}
    assert torch.equal(loaded.tensors["master.bias"], state.tensors["master.bias"])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        load_checkpoint(path)


def test_no_folder_means_no_checkpoints(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    assert load_newest(tmp_path / "none") is None
    assert best_checkpoint(tmp_path / "none") is None


def test_checkpoints_are_listed_by_step_and_strangers_are_ignored(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 5):
        (tmp_path / f"step-{step:08}").mkdir()
    for stranger in ("step-x", "step-5", ".step-00000007.ab.tmp", "other", "step-00000009.tmp"):
        (tmp_path / stranger).mkdir()
    (tmp_path / "step-00000006").write_text("a file")
    assert names(tmp_path) == ["step-00000005", "step-99999999", "step-100000000"]


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" x")


def to_list(path: Path) -> None:
    path.write_text("[[]]")


def to_text(path: Path) -> None:
    path.write_text('"text"')


def nest(path: Path) -> None:
    path.write_text("[" * 200_000)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage", [truncate, empty, flip, lengthen, to_list, to_text, nest, Path.unlink]
)
def test_a_damaged_newest_is_passed_over_and_it_says_so(
    file: str,
    damage: Callable[[Path], None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save_checkpoint(tmp_path, make_state(10))
    newest = save_checkpoint(tmp_path, make_state(20))
    damage(newest / file)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(newest)
    assert "\n" not in str(caught.value)
    assert_equal(load_newest(tmp_path), make_state(10))
    shown = " ".join(capfd.readouterr().err.split())
    assert "warning" in shown
    assert "step-00000020 is damaged" in shown
    assert "using the checkpoint before it" in shown


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_is_ever_loaded(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("bits")
    state = make_state(3, size=20)
    path = save_checkpoint(folder, state)
    file = path / data.draw(st.sampled_from(FILES))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        loaded = load_checkpoint(path)
    except CheckpointError:
        return
    # Only what says nothing about the state may differ: whether it was the best.
    assert file.name == "manifest.json"
    assert_equal(loaded, state)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200) | st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(
        st.sampled_from(["format_version", "files", "sha256", "bytes", "model.safetensors"]), inner
    ),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_manifest_does_more_than_damage(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    path = save_checkpoint(folder, make_state(3, size=20))
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert best_checkpoint(folder) is None
    save_checkpoint(folder, make_state(3, size=20))
    assert_equal(load_newest(folder), make_state(3, size=20))


def test_a_weights_file_with_a_lying_header_is_damage(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_state(1))
    header = b'{"bias":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (path / "model.safetensors").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {
        "bytes": len(content),
        "sha256": penstock.checkpoint.sha256_file(path / "model.safetensors"),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_when_none_is_whole_nothing_starts_afresh_silently(tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save_checkpoint(tmp_path, make_state(step)) / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        load_newest(tmp_path)


def test_a_newer_format_is_refused_not_passed_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_state(1))
    newest = save_checkpoint(tmp_path, make_state(2))
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(CheckpointError, match="format version 2"):
        load_newest(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_checkpoint_of_somebody_else_is_not_called_damaged(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_state(1))
    (path / "manifest.json").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_newest(tmp_path)


# Saving aside


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[AsyncSaver]:
    saver = AsyncSaver(tmp_path / "checkpoints", keep=2)
    yield saver
    saver.close()


def test_training_that_goes_on_does_not_change_what_is_saved(saver: AsyncSaver) -> None:
    state = make_state(4, size=300_000)
    expected = make_state(4, size=300_000)
    values = dict(state.values)
    saver.save(state)
    state.values["loss"] = None
    saver.wait_for_copy()
    for tensor in state.tensors.values():
        tensor.fill_(float("nan"))
    state.values.clear()
    saver.wait()
    assert_equal(load_newest(saver.folder), CheckpointState(4, expected.tensors, values))


def test_the_state_may_change_when_the_copy_has_failed(
    saver: AsyncSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **more: object) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        saver.save(make_state(1))
        saver.wait_for_copy()
        with pytest.raises(MemoryError):
            saver.wait()
    saver.save(make_state(2))
    saver.wait()
    assert_equal(load_newest(saver.folder), make_state(2))


def test_saved_aside_and_saved_at_once_are_the_same_bytes(saver: AsyncSaver) -> None:
    saver.save(make_state(1))
    saver.save(make_state(2), wait=True)
    saver.save(make_state(3), wait=True)
    saver.save(make_state(3))
    saver.wait()
    aside = saver.folder / "step-00000003"
    saver.close()
    other = save_checkpoint(saver.folder.parent / "other", make_state(3))
    for file in FILES:
        assert (aside / file).read_bytes() == (other / file).read_bytes()


def test_only_one_checkpoint_is_written_at_a_time(
    saver: AsyncSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most = 0, 0
    real = penstock.checkpoint.save_checkpoint

    def slow(*arguments: object, **more: object) -> Path:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        path = real(*arguments, **more)
        at_once -= 1
        return path

    monkeypatch.setattr(penstock.saving, "save_checkpoint", slow)
    started = time.monotonic()
    saver.save(make_state(1))
    assert time.monotonic() - started < 0.05
    saver.save(make_state(2))
    saver.save(make_state(3), wait=True)
    assert most == 1
    assert names(saver.folder) == ["step-00000002", "step-00000003"]


def test_the_newest_and_the_best_are_kept(saver: AsyncSaver) -> None:
    for step in range(1, 7):
        saver.save(make_state(step), is_best=step in {1, 3})
        saver.wait()
        assert best_checkpoint(saver.folder) == saver.folder / (
            "step-00000001" if step < 3 else "step-00000003"
        )
    assert names(saver.folder) == ["step-00000003", "step-00000005", "step-00000006"]
    assert not list(saver.folder.glob(".*"))


def test_a_damaged_newer_checkpoint_never_pushes_out_a_whole_one(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path, keep=1)
    saver.save(make_state(12), wait=True)
    truncate(tmp_path / "step-00000012" / "model.safetensors")
    save_checkpoint(tmp_path, make_state(10))
    saver.save(make_state(11), wait=True)
    saver.close()
    assert names(tmp_path) == ["step-00000011"]
    assert_equal(load_newest(tmp_path), make_state(11))


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(saver: AsyncSaver) -> None:
    saver.save(make_state(8), wait=True)
    truncate(saver.folder / "step-00000008" / "model.safetensors")
    saver.save(make_state(8), wait=True)
    assert_equal(load_newest(saver.folder), make_state(8))
    assert names(saver.folder) == ["step-00000008"]


def test_saving_the_best_once_more_leaves_it_the_best(saver: AsyncSaver) -> None:
    saver.save(make_state(8), is_best=True, wait=True)
    saver.save(make_state(8), wait=True)
    assert best_checkpoint(saver.folder) == saver.folder / "step-00000008"
    other = CheckpointState(8, make_state(9).tensors, {})
    saver.save(other, wait=True)
    assert best_checkpoint(saver.folder) is None


@pytest.mark.parametrize("calls", range(12))
def test_a_crash_at_any_rename_or_removal_leaves_the_step_loadable(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving step 8 again, as a finished run does that is started once more, keep=1."""
    folder = tmp_path / "checkpoints"
    saver = AsyncSaver(folder, keep=1)
    saver.save(make_state(8), wait=True)
    remaining = calls

    class CrashError(BaseException):
        pass

    def crashing(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            nonlocal remaining
            if remaining == 0:
                raise CrashError
            remaining -= 1
            return function(*arguments, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crashing(Path.rename))
        patch.setattr(Path, "replace", crashing(Path.replace))
        patch.setattr(shutil, "rmtree", crashing(shutil.rmtree))
        try:
            saver.save(make_state(8), wait=True)
        except CrashError:
            pass
        else:
            assert calls > 5
    saver.close()
    assert_equal(load_newest(folder), make_state(8))
    again = AsyncSaver(folder, keep=1)
    again.save(make_state(9), wait=True)
    again.close()
    assert [path.name for path in folder.iterdir()] == ["step-00000009"]


# Full disks


def test_a_failed_write_is_raised_by_the_next_call_and_the_one_after_works(
    saver: AsyncSaver,
) -> None:
    saver.save(make_state(1), wait=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        saver.save(make_state(2, size=50_000))
        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            saver.wait()
        assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in saver.folder.iterdir()] == ["step-00000001"]
    assert_equal(load_newest(saver.folder), make_state(1))
    saver.save(make_state(3))
    saver.wait()
    assert_equal(load_newest(saver.folder), make_state(3))


def test_closing_raises_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    saver = AsyncSaver(tmp_path / "checkpoints", keep=1)
    saver.save(make_state(1))
    with pytest.raises(CheckpointError, match="could not be written"):
        saver.close()
    threads = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("checkpoint") for name in threads)


@pytest.mark.parametrize("room_for", [0.0, 0.3, 0.99])
def test_a_full_disk_leaves_older_checkpoints_untouched(room_for: float, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    try:
        folder = mount / "checkpoints"
        saver = AsyncSaver(folder, keep=2)
        saver.save(make_state(1, size=80_000), wait=True)
        size = sum(file.stat().st_size for file in (folder / "step-00000001").iterdir())
        room = shutil.disk_usage(mount).free - int(size * room_for)
        (mount / "filler").write_bytes(bytes(room))
        with pytest.raises(CheckpointError, match=r"the disk is full .*: make room"):
            saver.save(make_state(2, size=80_000), wait=True)
        assert [path.name for path in folder.iterdir()] == ["step-00000001"]
        load_checkpoint(folder / "step-00000001")
        (mount / "filler").unlink()
        saver.save(make_state(2, size=80_000), wait=True)
        saver.close()
        assert names(folder) == ["step-00000001", "step-00000002"]
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_full_disks_are_told_by_the_systems_number_wherever_it_stands() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert penstock.checkpoint._reason(full) == "the disk is full"
    error = safetensors.SafetensorError("Error while serializing: I/O error: x (os error 122)")
    assert penstock.checkpoint._reason(error) == "the disk is full"
    assert penstock.checkpoint._reason(OSError(errno.EROFS, "x")) == os.strerror(errno.EROFS)


# kill -9

SAVE_IN_A_LOOP = """
import sys
from pathlib import Path
from tests.test_checkpoint import make_state
from penstock.checkpoint import load_newest
from penstock.saving import AsyncSaver
folder = Path(sys.argv[1])
newest = load_newest(folder)
step = 0 if newest is None else newest.step
saver = AsyncSaver(folder, keep=1)
while True:
    step += 1
    saver.save(make_state(step, size=100_000), is_best=step % 5 == 0)
    if step % 3 == 0:
        saver.save(make_state(step, size=100_000), wait=True)
    print(step - 1, flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_leaves_the_newest_finished_checkpoint(
    kills: int, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    chance = random.Random(kills)
    inside = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_IN_A_LOOP, str(folder)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            text=True,
        )
        assert process.stdout is not None
        for _ in range(3):
            finished = int(process.stdout.readline())
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        finished = max([finished, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        inside += bool(list(folder.glob(".step-*")))
        newest = load_newest(folder)
        assert newest is not None
        assert newest.step >= finished
        assert_equal(newest, make_state(newest.step, size=100_000))
    assert inside or kills < 20, "no kill came in the middle of a save"
