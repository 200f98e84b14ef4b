"""Hold the rules of the house that no linter knows: sizes, docstrings, words, who may print.

Run by `make check`; prints each breach and exits 1 when there is one.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE_LINES, FUNCTION_LINES = 300, 60
MAY_READ_ENVIRONMENT = {
    "penstock/bench/process.py",
    "penstock/config/folders.py",
    "penstock/hardware/process.py",
    "penstock/compiler/inductor.py",
    "penstock/data/tokenize.py",
    "penstock/parallel/environment.py",
    "penstock/parallel/launch.py",
}
READS_ENVIRONMENT = re.compile(r"\bos\.(environ|getenv)\b|from os import .*\b(environ|getenv)\b")
FORBIDDEN_WORDS = re.compile(r"\b(n_layer_count|block_size|gradient_checkpointing|d_model)\b")

THEIR_WORDS = "penstock/migrate/"
"""Where other projects' settings are named, to be translated."""


def breaches(path: Path) -> Iterator[str]:
    """Everything wrong with one module."""
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > MODULE_LINES:
        yield f"{name}: {lines} lines"
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\bTODO\b(?!\(#\d+\))", line):
            yield f"{name}:{number}: TODO without an issue"
        if FORBIDDEN_WORDS.search(line) and not name.startswith(THEIR_WORDS):
            yield f"{name}:{number}: another project's word"
        if READS_ENVIRONMENT.search(line) and name not in MAY_READ_ENVIRONMENT:
            yield f"{name}:{number}: reads the environment"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "eval", "exec"):
            yield f"{name}:{node.lineno}: calls {node.func.id}"  # type: ignore[attr-defined]


def main() -> int:
    """Check every module of the package."""
    found = [b for path in sorted((ROOT / "penstock").rglob("*.py")) for b in breaches(path)]
    for breach in found:
        print(breach)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
