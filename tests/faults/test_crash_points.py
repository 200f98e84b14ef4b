"""A crash at every system call of a save, and a failure of every one of them.

Saving is traced by strace, which also kills the process or makes a call fail. From the trace, what
a power cut leaves on the disk is worked out for every moment: what was not synced may be lost, as
ALICE does it (Pillai et al., OSDI 2014, §4).
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.checkpoint import list_checkpoints, load_newest
from penstock.errors import CheckpointError
from tests.test_checkpoint import assert_equal, make_state

ROOT = Path(__file__).resolve().parents[2]
CALLS = (
    "open,openat,write,pwrite64,ftruncate,fsync,fdatasync,link,linkat,rename,renameat,renameat2,"
    "mkdir,unlink,unlinkat,rmdir,close"
)
OLD, NEW = make_state(8, size=200), make_state(9, size=200)


class Saver:
    """The process of `saving_child.py`."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "import tests.faults.saving_child"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def save(self, folder: Path, step: int, *tracing: str, careless: bool = False) -> int:
        """Save a step, under strace with these options if there are any; the wait status.

        `careless`: nothing is synced.
        """
        command = {"folder": str(folder), "step": step, "traced": bool(tracing)}
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


# What a power cut leaves


class Disk:
    """Files and folders under one root as a trace changes them: what is seen, and what is safe.

    A file's content is safe at its last fsync, a name in a folder at the folder's. The harshest
    disk loses all else; the kindest nothing; some in between lose contents and keep names.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.open: dict[str, str] = {}
        """Path by descriptor."""
        self.at: dict[str, int] = {}
        """Where a descriptor writes next."""
        self.seen: dict[str, bytearray | None] = {root: None}
        """By path: content, None for a folder."""
        self.safe_names: dict[str, bytearray | None] = {root: None}
        """Names that a power cut leaves, with the content they stand for (shared with `seen`)."""
        self.safe_content: dict[int, bytes] = {}
        """By identity of the content: what of it is safe."""

    def add(self, path: str, content: bytes | None) -> None:
        """What was there, and safe, before."""
        self.seen[path] = self.safe_names[path] = None if content is None else bytearray(content)
        if content is not None:
            self.safe_content[id(self.seen[path])] = content

    def facts(self) -> dict[str, object]:
        """What tells whether a call changed anything."""
        return {name: (id(c), None if c is None else bytes(c)) for name, c in self.seen.items()}

    def apply(self, call: str, arguments: str, result: str) -> None:
        """One call of the trace; those that failed changed nothing."""
        if result.startswith("-1"):
            return
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
        descriptor = arguments.partition(",")[0]
        if call in ("open", "openat") and texts[0].startswith(self.root):
            self.open[result.strip()] = texts[0]
            if "O_CREAT" in arguments:
                self.seen.setdefault(texts[0], bytearray())
            if "O_TRUNC" in arguments:
                self.seen[texts[0]][:] = b""
            self.at[result.strip()] = 0
        elif call == "close":
            self.open.pop(descriptor, None)
        elif call == "lseek":
            self.at[descriptor] = int(result)
        elif call in ("mkdir", "rename", "renameat", "renameat2", "link", "linkat"):
            self._name(call, texts)
        elif call in ("unlink", "unlinkat", "rmdir"):
            path = texts[0]
            inside = path if path.startswith("/") else f"{self.open.get(descriptor)}/{path}"
            self.seen.pop(inside, None)
        elif descriptor in self.open:
            self._change(call, descriptor, arguments, texts)

    def _change(self, call: str, descriptor: str, arguments: str, texts: list[str]) -> None:
        path = self.open[descriptor]
        if call in ("fsync", "fdatasync"):
            self._sync(path)
            return
        content = self.seen[path]
        if call == "ftruncate":
            size = int(arguments.rpartition(",")[2])
            content[:] = content[:size].ljust(size, b"\0")
        elif call == "write":
            data, at = bytes.fromhex(texts[0].replace("\\x", "")), self.at[descriptor]
            content.extend(bytes(max(0, at - len(content))))  # A hole, if it was sought past.
            content[at : at + len(data)] = data
            self.at[descriptor] = at + len(data)
        else:
            raise NotImplementedError(call)

    def _name(self, call: str, texts: list[str]) -> None:
        if call == "mkdir":
            self.seen[texts[0]] = None
        elif texts[0].startswith(self.root) and call.startswith("link"):
            self.seen[texts[1]] = self.seen[texts[0]]
        elif texts[0].startswith(self.root):
            self._rename(texts[0], texts[1])

    def _rename(self, old: str, new: str) -> None:
        moved = [p for p in self.seen if p == old or p.startswith(old + "/")]
        for path in moved:
            self.seen[new + path[len(old) :]] = self.seen.pop(path)

    def _sync(self, path: str) -> None:
        content = self.seen[path]
        if content is not None:
            self.safe_content[id(content)] = bytes(content)
            return
        parent = path + "/"

        def inside(name: str) -> bool:
            return name.startswith(parent) and "/" not in name[len(parent) :]

        for name in [n for n in self.safe_names if inside(n) and n not in self.seen]:
            for below in [n for n in self.safe_names if n == name or n.startswith(name + "/")]:
                del self.safe_names[below]
        for name in [n for n in self.seen if inside(n)]:
            fresh = name not in self.safe_names or self.safe_names[name] is not self.seen[name]
            self.safe_names[name] = self.seen[name]
            if fresh and self.seen[name] is None:
                self._carry(name)

    def _carry(self, folder: str) -> None:
        """A folder that was renamed brings what was safe in it under its former name."""
        contents = {id(c) for c in self.safe_names.values() if c is not None}
        for name, content in self.seen.items():
            if name.startswith(folder + "/") and content is not None and id(content) in contents:
                self.safe_names[name] = content

    def leave(self, target: Path, mode: str) -> None:
        """Write what a crash leaves now: "kill" all that is seen; "harsh" only what is safe;
        "names" all names, but of contents only what is safe.
        """
        names = self.safe_names if mode == "harsh" else self.seen
        for name, content in sorted(names.items(), key=lambda item: item[0].count("/")):
            path = target / name[len(self.root) :].lstrip("/")
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
            elif path.parent.is_dir():
                kept = content if mode == "kill" else self.safe_content.get(id(content), b"")
                path.write_bytes(kept)


LINE = re.compile(r"(?:\d+ +)?(\w+)\((.*)\) += (.+)$")


def crashes_of(saver: Saver, folder: Path, *, careless: bool = False) -> int:
    """Trace a save of step 9, and check every crash; how many there were."""
    root = folder.parent
    disk = Disk(str(root))
    for path in sorted(root.rglob("*"), key=lambda p: len(p.parts)):
        disk.add(str(path), None if path.is_dir() else path.read_bytes())
    trace = root.parent / f"{root.name}-trace"
    options = ("-xx", "-s", "1000000", "-o", str(trace), "-e", f"trace={CALLS},lseek")
    assert saver.save(folder, 9, *options, careless=careless) == 0
    crashes = changed = 0
    for line in trace.read_text().splitlines():
        match = LINE.match(readable(line))
        if match is None:
            continue
        before = disk.facts()
        disk.apply(*match.groups())
        if before == disk.facts() and match[1] not in ("fsync", "fdatasync"):
            continue
        changed += 1
        for mode in ("kill", "harsh", "names"):
            target = root.parent / f"{root.name}-crash"
            shutil.rmtree(target, ignore_errors=True)
            disk.leave(target, mode)
            assert_whole(target / "checkpoints")
            crashes += 1
    assert changed > 15, "the trace shows no save"
    # The model of the disk ends where the disk is.
    for name, content in disk.seen.items():
        assert Path(name).is_dir() if content is None else Path(name).read_bytes() == content
    assert {str(p) for p in root.rglob("*")} == set(disk.seen) - {str(root)}
    return crashes


def test_a_power_cut_at_any_system_call_leaves_a_whole_checkpoint(
    saver: Saver, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = fresh(tmp_path / "root", saver)
    # A step after another, whose checkpoint is then removed; then one step saved again.
    crashes = [crashes_of(saver, folder), crashes_of(saver, folder)]
    assert min(crashes) > 60
    record_property("crashes", crashes)


def test_the_model_of_a_power_cut_finds_a_save_that_syncs_nothing(
    saver: Saver, tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, AssertionError)):
        crashes_of(saver, fresh(tmp_path / "root", saver), careless=True)


def readable(line: str) -> str:
    """Paths as text: -xx writes all strings in hexadecimal, as contents need it."""
    if "write" in line.partition("(")[0]:
        return line
    return re.sub(r'"((?:\\x[0-9a-f]{2})+)"', _as_text, line)


def _as_text(match: re.Match[str]) -> str:
    return f'"{bytes.fromhex(match[1].replace(chr(92) + "x", "")).decode()}"'


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
