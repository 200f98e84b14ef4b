"""Run the user's C++ compiler on a source of ours; what it does not like becomes one line."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from penstock.errors import ExecutableError

COMPILERS = ("g++", "clang++")
"""In the order they are looked for."""


def found_compiler() -> str | None:
    """The first of them that is on the PATH."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def run_compiler(command: Sequence[str], *, what: str, do: str) -> None:
    """Compile, or pack what was compiled.

    Raises:
        ExecutableError: the program fails; `what` it was for, and what to `do`.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's compiler on our source
    if done.returncode:
        raise ExecutableError(
            f"{Path(command[0]).name} does not compile {what}: "
            f"{(done.stderr.strip().splitlines() or ['no message'])[0]}",
            where="compile.toolchain",
            do=do,
        )
