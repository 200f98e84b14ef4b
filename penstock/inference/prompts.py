"""Prompts from a JSONL file and completions to one, and from a person at a terminal.

`api.generate` chooses between them. It must never know how text is continued.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock.console import Console
from penstock.errors import DataError
from penstock.files import atomic_write
from penstock.inference.engine import Completion


def read_prompts(path: Path) -> list[str]:
    """The `prompt` of each line's object; blank lines are passed over.

    Raises:
        DataError: no file, or a line that is not {"prompt": "…"}; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", where="generate.input", do="check the file"
        ) from None
    prompts: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise DataError(
                f'line {number} is not {{"prompt": "text"}}',
                where=f"{path}:{number}",
                do="write one JSON object with a prompt per line",
            )
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} has no prompts", where="generate.input", do="add some lines")
    return prompts


def write_completions(path: Path, completions: Sequence[Completion]) -> None:
    """One JSON object per line, in the order of the prompts; the file appears whole."""
    atomic_write(path, "".join(json.dumps(item.json()) + "\n" for item in completions))


def converse(
    console: Console,
    generate: Callable[[str, Callable[[str], None]], Completion],
    read_line: Callable[[str], str] = input,
) -> None:
    """Ask for prompts and stream their continuations until end of input or Ctrl-C."""
    console.info("Type a prompt; an empty line or Ctrl-D ends.")
    while True:
        try:
            prompt = read_line("> ")
            if not prompt:
                return
            console.write(prompt, end="")
            completion = generate(prompt, lambda text: console.write(text, end=""))
            console.write("")
            console.info(f"{completion.tokens} tokens in {completion.seconds:.2f} s")
        except (EOFError, KeyboardInterrupt):
            console.write("")
            return
