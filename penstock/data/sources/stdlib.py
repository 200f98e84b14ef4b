"""The Python standard library's own source: real text on every machine that has Python.

`data/sources` offers it as kind=stdlib. It must never import what it lists.
"""

import sysconfig
from pathlib import Path

from penstock.data.sources.files import SourceFile

_LEFT_OUT_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
"""Tests, installed packages, and tables that a generator wrote (character maps, help topics)."""
_LEFT_OUT_FILES = ("_sysconfigdata", "this.py", "entities.py", "stringprep.py")


def list_stdlib() -> list[SourceFile]:
    """Every .py file of the standard library but tests, site-packages and generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[SourceFile] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT_FOLDERS.intersection(relative.parts[:-1]) or not path.is_file():
            continue
        if relative.parts[0].startswith("config-") or path.name.startswith(_LEFT_OUT_FILES):
            continue
        status = path.stat()
        files.append(SourceFile(relative.as_posix(), str(path), status.st_size, status.st_mtime_ns))
    return files
