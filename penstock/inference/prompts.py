"""Prompts from a JSONL file and completions to one, and from a person at a terminal.

`api.generate` chooses between them. It must never know how text is continued.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock.console import Console
from penstock.errors import DataError, UserError
from penstock.files import atomic_write
from penstock.inference.engine import Completion, is_text


def read_prompts(path: Path) -> list[str]:
    """The `prompt` of each line's object; blank lines and a byte order mark are passed over.

    Raises:
        DataError: no file, or a line that is not {"prompt": "…"} in UTF-8; the line is named.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", where="generate.input", do="check the file"
        ) from None
    prompts: list[str] = []
    # Bytes, not str.splitlines: that one also cuts at U+0085 and U+2028, which JSON text may hold.
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str) or not is_text(prompt):
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
    """Ask for prompts and stream their continuations until end of input or Ctrl-C.

    A prompt that cannot be continued is told so, and the next one asked for.
    """
    console.info("Type a prompt; an empty line or Ctrl-D ends.")
    try:
        while prompt := read_line("> "):
            _answer(console, generate, prompt)
    except (EOFError, KeyboardInterrupt):
        console.write("")


def _answer(
    console: Console, generate: Callable[[str, Callable[[str], None]], Completion], prompt: str
) -> None:
    """Show one prompt with its continuation."""
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        console.write(text if begun else prompt + text, end="")
        begun = True

    try:
        completion = generate(prompt, show)
    except UserError as error:
        console.error(str(error))
        return
    console.write("" if begun else prompt)
    console.info(f"{completion.tokens} tokens in {completion.seconds:.2f} s")
