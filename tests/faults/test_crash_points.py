"""A crash at every system call of a save, and a failure of every one of them.

Saving is traced by strace, which also kills the process or makes a call fail. From the trace, what
a power cut leaves on the disk is worked out for every moment (`disk_model.py`).
"""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.checkpoint import list_checkpoints, load_newest
from penstock.compiler.executable import Executable
from penstock.data.dataset import Dataset
from penstock.errors import CheckpointError, UserError
from tests.faults.disk_model import CALLS, LINE, check_crashes, disk_of
from tests.test_checkpoint import assert_equal, make_state

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = make_state(8, size=200), make_state(9, size=200)


class Saver:
    """The process of `saving_child.py`."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "import tests.faults.saving_child"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def save(
        self, folder: Path, step: int, *tracing: str,
        careless: bool = False, what: str = "checkpoint",
    ) -> int:  # fmt: skip
        """Save a step, under strace with these options if there are any; the wait status.

        `careless`: nothing is synced. `what`: checkpoint, executable or dataset, of which `step`
        says which.
        """
        command = {"folder": str(folder), "step": step, "traced": bool(tracing), "what": what}
        command["careless"] = careless
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        child = self.process.stdout.readline().strip()
        if tracing:
            tracer = ["strace", "-q", *tracing, "-p", child]
            subprocess.run(tracer, check=False, capture_output=True, timeout=60)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    probe = ["strace", "-o", "/dev/null", "true"]
    if shutil.which("strace") is None or subprocess.run(probe, check=False).returncode:
        pytest.skip("strace is not here, or may not trace")
    saver = Saver()
    yield saver
    saver.process.stdin.close()
    saver.process.wait(30)


def fresh(folder: Path, saver: Saver) -> Path:
    """A folder with the checkpoint of step 8."""
    assert saver.save(folder / "checkpoints", 8) == 0
    return folder / "checkpoints"


def assert_whole(folder: Path) -> int:
    """The newest is step 8 or 9 as it was saved; which."""
    newest = load_newest(folder)
    assert_equal(newest, OLD if newest is not None and newest.step == 8 else NEW)
    return newest.step


def crashes_of(
    saver: Saver, folder: Path, check: Callable[[Path], object], *, what: str = "checkpoint",
    careless: bool = False,
) -> int:  # fmt: skip
    """Trace a save of the second of its kind, and check every crash; how many there were."""
    root = folder.parent
    disk = disk_of(root)
    trace = root.parent / f"{root.name}-trace"
    options = ("-xx", "-s", "1000000", "-o", str(trace), "-e", f"trace={CALLS},lseek")
    assert saver.save(folder, 9, *options, careless=careless, what=what) == 0
    crashes = check_crashes(disk, trace.read_text(), lambda left: check(left / folder.name))
    assert crashes > 9, "the trace shows no save"
    return crashes


def test_a_power_cut_at_any_system_call_leaves_a_whole_checkpoint(
    saver: Saver, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = fresh(tmp_path / "root", saver)
    # A step after another, whose checkpoint is then removed; then one step saved again.
    crashes = [crashes_of(saver, folder, assert_whole) for _ in range(2)]
    assert min(crashes) > 60
    record_property("crashes", crashes)


def test_the_model_of_a_power_cut_finds_a_save_that_syncs_nothing(
    saver: Saver, tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, AssertionError)):
        crashes_of(saver, fresh(tmp_path / "root", saver), assert_whole, careless=True)


def test_a_power_cut_while_an_executable_is_written_leaves_the_old_one_or_the_new(
    tiny_executable: Path, saver: Saver, tmp_path: Path
) -> None:
    (tmp_path / "given").symlink_to(tiny_executable)
    file = tmp_path / "root" / "made.penstock"
    assert saver.save(file, 8, what="executable") == 0
    old, found = file.read_bytes(), set()

    def check(left: Path) -> None:
        opened = Executable.inspect(left)
        assert opened.origin == "yours"
        found.add(left.read_bytes())

    assert crashes_of(saver, file, check, what="executable") > 9
    assert found == {old, file.read_bytes()}
    assert len(found) == 2


def test_a_power_cut_while_data_are_prepared_leaves_no_dataset_of_two_minds(
    saver: Saver, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for step in (8, 9):
        words = [f"{step} is what {number} of these lines hold\n" for number in range(60)]
        (tmp_path / f"text-{step}.txt").write_text("".join(words))
    folder = tmp_path / "root" / "dataset"
    assert saver.save(folder, 8, what="dataset") == 0
    old = Dataset.open(folder).manifest
    found: Counter[str] = Counter()

    def check(left: Path) -> None:
        try:
            manifest = Dataset.open(left).manifest
        except UserError:
            found["none"] += 1
            return
        found["old" if manifest == old else "new"] += 1
        assert manifest in (old, Dataset.open(folder).manifest)

    crashes = crashes_of(saver, folder, check, what="dataset")
    assert crashes > 60
    assert set(found) == {"old", "none", "new"}
    record_property("crashes", f"{crashes}: {dict(found)}")


# What strace makes of a real one


def counts(saver: Saver, folder: Path, trace: Path) -> Counter[str]:
    """Calls of one save, by name."""
    assert saver.save(folder, 9, "-o", str(trace), "-e", f"trace={CALLS}") == 0
    return Counter(match[1] for match in map(LINE.match, trace.read_text().splitlines()) if match)


POINTS = [pytest.param(9, id="some"), pytest.param(1, id="every", marks=pytest.mark.slow)]


@pytest.mark.parametrize("every", POINTS)
def test_kill_9_at_system_calls_leaves_a_whole_checkpoint(
    every: int, saver: Saver, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    calls = counts(saver, fresh(tmp_path / "counted", saver), tmp_path / "trace")
    points = [(call, k) for call, count in sorted(calls.items()) for k in range(1, count + 1)]
    found: Counter[int] = Counter()
    for call, k in points[::every]:
        folder = fresh(tmp_path / f"{call}-{k}", saver)
        status = saver.save(
            folder, 9, "-e", f"trace={call}", f"--inject={call}:signal=SIGKILL:when={k}"
        )
        if status == 0:
            continue  # This save made one call fewer of the kind.
        assert status == signal.SIGKILL
        found[assert_whole(folder)] += 1
        assert saver.save(folder, 9) == 0
        assert [path.name for path in folder.iterdir()] == ["step-00000009"]
    assert found[8] > 0
    assert sum(found.values()) > 0.8 * len(points[::every])
    record_property("kills", f"{sum(found.values())} of {len(points)} calls, {dict(found)}")


FAILURES = [(e, c) for e in ("ENOSPC", "EDQUOT", "EIO") for c in ("write", "fsync")]
FAILURES += [("EROFS", "mkdir"), ("EACCES", "rename"), ("EMFILE", "openat")]


@pytest.mark.parametrize("every", POINTS)
def test_a_call_that_fails_costs_that_save_only(
    every: int, saver: Saver, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    calls = counts(saver, fresh(tmp_path / "counted", saver), tmp_path / "trace")
    points = [(e, call, k) for e, call in FAILURES for k in range(1, calls[call] + 1)]
    failed = 0
    for error, call, k in points[::every]:
        folder = fresh(tmp_path / f"{error}-{call}-{k}", saver)
        status = saver.save(
            folder, 9, "-e", f"trace={call}", f"--inject={call}:error={error}:when={k}"
        )
        assert status in (0, 2 << 8), (folder.parent / "said").read_text()
        step = assert_whole(folder)
        if status:
            failed += 1
            said = (folder.parent / "said").read_text()
            assert "could not be written" in said
            assert "\n" not in said
            full = error in ("ENOSPC", "EDQUOT")
            assert ("the disk is full" in said) == full, said
            assert not list(folder.glob(".*"))
        else:
            assert step == 9
        assert saver.save(folder, 10) == 0
        assert [path.name for path in list_checkpoints(folder)][-1] == "step-00000010"
    assert failed > len(points[::every]) // 2
    record_property("failures", f"{failed} of {len(points[::every])} calls")
