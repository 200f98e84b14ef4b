"""Prompts and completions in files, and a conversation at a terminal."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.console import Console
from penstock.errors import DataError, UserError
from penstock.inference.engine import Completion
from penstock.inference.prompts import converse, read_prompts, write_completions


def file_of(folder: Path, content: bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "line",
    [b"not json", b'["prompt"]', b'{"prompt": 3}', b'{"text": "a"}', b'{"prompt": "\xff"}',
     b'{"prompt": "\\ud800"}', b"[" * 100_000],
    ids=["no JSON", "a list", "a number", "another key", "no UTF-8", "half a character", "deep"],
)  # fmt: skip
def test_bad_lines_are_named(line: bytes, tmp_path: Path) -> None:
    path = file_of(tmp_path, b'{"prompt": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match="line 3") as caught:
        read_prompts(path)
    assert caught.value.where == f"{path}:3"


def test_lines_end_only_where_json_lines_do(tmp_path: Path) -> None:
    prompts = ["a\u2028b", "c\x85d", "e\u2029", "line\nbreak", ""]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    assert read_prompts(file_of(tmp_path, "\r\n".join(lines).encode())) == prompts


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert read_prompts(file_of(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\n')) == ["a"]


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no prompts"):
        read_prompts(file_of(tmp_path, b"\n \n"))
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path)


def test_completions_keep_the_order_and_every_character(tmp_path: Path) -> None:
    path = tmp_path / "out" / "completions.jsonl"
    written = [
        Completion(prompt, text, 3, 0.5, "tokens")
        for prompt, text in (("b\u2028", "☃\n"), ("a", "\ufffd"))
    ]
    write_completions(path, written)
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert read == [completion.json() for completion in written]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def talk(
    lines: list[str | type[BaseException]],
    generate: Callable[[str, Callable[[str], None]], Completion],
) -> None:
    entries = iter(lines)

    def read_line(prompt: str) -> str:
        entry = next(entries)
        if isinstance(entry, str):
            return entry
        raise entry

    converse(Console(), generate, read_line)


def echo(prompt: str, write: Callable[[str], None]) -> Completion:
    if prompt == "long":
        raise UserError("too long")
    if prompt == "interrupt":
        write("half")
        raise KeyboardInterrupt
    for character in prompt.upper():
        write(character)
    return Completion(prompt, prompt.upper(), len(prompt), 0.1, "tokens")


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt, ""])
def test_a_conversation_streams_and_ends_cleanly(
    end: str | type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    talk(["ab", end], echo)
    assert capsys.readouterr().out.rstrip("\n") == "abAB"


def test_a_refused_prompt_does_not_end_the_conversation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk(["long", "ab", EOFError], echo)
    shown = capsys.readouterr()
    assert "too long" in shown.err
    assert shown.out.rstrip("\n") == "abAB"


def test_an_interrupted_continuation_ends_the_conversation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk(["interrupt", "never read"], echo)
    assert capsys.readouterr().out == "interrupthalf\n"


def test_a_prompt_without_continuation_is_shown_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def silent(prompt: str, write: Callable[[str], None]) -> Completion:
        return Completion(prompt, "", 0, 0.1, "end of text")

    talk(["ab", EOFError], silent)
    assert capsys.readouterr().out == "ab\n\n"
