"""Runs a recipe's shell script for real, its `penstock` answered by this process.

A new interpreter for each verb would spend most of a test's time on importing torch. The script's
`penstock` hands its words over a socket; `main` runs here, in the script's folder.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

from penstock.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
_CLIENT = """#!{python} -S
import json, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
stream = connection.makefile("rw")
stream.write(json.dumps(sys.argv[1:]) + "\\n")
stream.flush()
code, output = json.loads(stream.readline())
sys.stdout.write(output)
sys.exit(code)
"""


def run_script(folder: Path, script: str, *overrides: str, **variables: str) -> list[list[str]]:
    """Run recipes/SCRIPT in a copy of the recipes in `folder`; the words of each verb it ran.

    Raises:
        AssertionError: the script failed; its output is the message.
    """
    if not (folder / "recipes").exists():
        shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "bin").mkdir(exist_ok=True)
    address = str(folder / "socket")
    client = folder / "bin" / "penstock"
    client.write_text(_CLIENT.format(python=sys.executable, address=address))
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    Path(address).unlink(missing_ok=True)
    words: list[list[str]] = []
    before = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind(address)
        server.listen()
        server.settimeout(0.2)
        path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
        process = subprocess.Popen(
            ["sh", f"recipes/{script}", *overrides],
            env={**os.environ, **variables, "PATH": path + os.environ["PATH"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while process.poll() is None:
            with contextlib.suppress(TimeoutError):
                words.append(_answer(server))
    output, _ = process.communicate()
    assert Path.cwd() == before
    assert process.returncode == 0, output
    return words


def _answer(server: socket.socket) -> list[str]:
    """Run one verb for the script."""
    connection, _ = server.accept()
    connection.settimeout(None)
    with connection, connection.makefile("rw") as stream:
        words: list[str] = json.loads(stream.readline())
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            code = main(words)
        stream.write(json.dumps([code, written.getvalue()]) + "\n")
        stream.flush()
    return words
