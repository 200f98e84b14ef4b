"""What a power cut leaves of files and folders, worked out from a trace of system calls.

What was not synced may be lost, as ALICE has it (Pillai et al., OSDI 2014, §4).
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

CALLS = (
    "open,openat,write,pwrite64,ftruncate,fsync,fdatasync,link,linkat,rename,renameat,renameat2,"
    "mkdir,unlink,unlinkat,rmdir,close"
)
LINE = re.compile(r"(?:\d+ +)?(\w+)\((.*)\) += (.+)$")
"""A call of strace's: name, arguments, result."""


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
        if call in ("open", "openat"):
            self._open(self._path(descriptor, texts[0]), arguments, result.strip())
        elif call == "close":
            self.open.pop(descriptor, None)
        elif call == "lseek":
            self.at[descriptor] = int(result)
        elif call in ("mkdir", "rename", "renameat", "renameat2", "link", "linkat"):
            self._name(call, texts)
        elif call in ("unlink", "unlinkat", "rmdir"):
            self.seen.pop(self._path(descriptor, texts[0]), None)
        elif descriptor in self.open:
            self._change(call, descriptor, arguments, texts)

    def _path(self, descriptor: str, path: str) -> str:
        """What a path stands for that may be relative to an open folder."""
        return path if path.startswith("/") else f"{self.open.get(descriptor)}/{path}"

    def _open(self, path: str, arguments: str, descriptor: str) -> None:
        if not path.startswith(self.root):
            return
        self.open[descriptor], self.at[descriptor] = path, 0
        if "O_CREAT" in arguments:
            self.seen.setdefault(path, bytearray())
        if "O_TRUNC" in arguments:
            self.seen[path][:] = b""
        assert "O_APPEND" not in arguments, arguments

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


def readable(line: str) -> str:
    """Paths as text: -xx writes all strings in hexadecimal, as contents need it."""
    if "write" in line.partition("(")[0]:
        return line
    return re.sub(r'"((?:\\x[0-9a-f]{2})+)"', _as_text, line)


def _as_text(match: re.Match[str]) -> str:
    return f'"{bytes.fromhex(match[1].replace(chr(92) + "x", "")).decode()}"'


def check_crashes(disk: Disk, trace: str, check: Callable[[Path], object]) -> int:
    """Call `check` with the root as a crash after each call that changes something leaves it; how
    many there were. Beside the root is where it is rebuilt.

    A crash is a kill, which loses nothing, or a power cut with the harshest disk or one between.
    """
    root = Path(disk.root)
    crashes = 0
    for line in trace.splitlines():
        match = LINE.match(readable(line))
        if match is None:
            continue
        before = disk.facts()
        disk.apply(*match.groups())
        if before == disk.facts() and match[1] not in ("fsync", "fdatasync"):
            continue
        for mode in ("kill", "harsh", "names"):
            target = root.parent / f"{root.name}-crash"
            shutil.rmtree(target, ignore_errors=True)
            disk.leave(target, mode)
            check(target)
            crashes += 1
    # The model of the disk ends where the disk is.
    for name, content in disk.seen.items():
        assert Path(name).is_dir() if content is None else Path(name).read_bytes() == content
    assert {str(p) for p in root.rglob("*")} == set(disk.seen) - {str(root)}
    return crashes


def disk_of(root: Path) -> Disk:
    """The model of what is there now, all of it safe."""
    disk = Disk(str(root))
    for path in sorted(root.rglob("*"), key=lambda p: len(p.parts)):
        disk.add(str(path), None if path.is_dir() else path.read_bytes())
    return disk
