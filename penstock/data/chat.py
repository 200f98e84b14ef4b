"""Chats laid out by a tokenizer's own template, and which characters of them are the assistant's.

`data/encode.py` renders through it. It must never tokenize. Source: Hugging Face transformers'
chat templates (Jinja2 in a sandbox, the same variables and functions; `strftime_now` is left out,
so that the same chat gives the same text on every day).
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from penstock.data.sources.piece import Message
from penstock.errors import DataError
from penstock.files import canonical_json, read_json

_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_BEGIN, _END = "\ue000\ue001generation\ue001", "\ue001generation\ue001\ue000"
"""Stand around what `{% generation %}` holds until they are taken out again."""
Span = tuple[int, int]


class TemplateError(Exception):
    """A chat the template refuses or cannot lay out; says why."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens it may name."""

    template: str
    tokens: dict[str, str]

    @staticmethod
    def find(folder: str | None) -> "ChatTemplate | None":
        """The template in a tokenizer's folder: a file of its own, or in its settings.

        Raises:
            DataError: it is no template.
        """
        if folder is None or not Path(folder).is_dir():
            return None
        settings: Any = {}
        if (Path(folder) / _SETTINGS).is_file():
            settings = read_json(Path(folder) / _SETTINGS)
        settings = settings if isinstance(settings, dict) else {}
        template = settings.get("chat_template")
        if isinstance(template, list):
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if (Path(folder) / _TEMPLATE).is_file():
            template = (Path(folder) / _TEMPLATE).read_text(encoding="utf-8")
        if not isinstance(template, str):
            return None
        tokens = {name: _token(settings.get(name)) for name in _TOKENS}
        found = ChatTemplate(template, {name: t for name, t in tokens.items() if t is not None})
        found.check(folder)
        return found

    @staticmethod
    def from_json(text: str) -> "ChatTemplate":
        """What `json` has written."""
        values = json.loads(text)
        return ChatTemplate(values["template"], values["tokens"])

    def json(self) -> str:
        """Everything, as text."""
        return canonical_json(dataclasses.asdict(self))

    def check(self, folder: str) -> None:
        """Refuse what is no Jinja2."""
        try:
            _compiled(self.template)
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template of {folder} is none: {error}",
                where="tokenizer.from",
                do="mend it",
            ) from None

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The chat's text, and the characters from and up to which the assistant speaks.

        They are what `{% generation %}` marks; in a template without it, what each of the
        assistant's messages adds to the text before it.

        Raises:
            TemplateError: the template refuses the chat, or lays out its beginning otherwise
                than the whole, so that the assistant's part cannot be told.
        """
        if "generation" in _compiled(self.template).tags:
            return _taken_out(self._text(messages, False))
        whole = self._text(messages, False)
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], True)
            upto = self._text(messages[: number + 1], False)
            if not upto.startswith(before):
                before = self._text(messages[:number], False)
            if not (whole.startswith(upto) and upto.startswith(before)):
                raise TemplateError(f"message {number + 1} is laid out otherwise in a whole chat")
            spans.append((len(before), len(upto)))
        return whole, spans

    def _text(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            text = _compiled(self.template).render(
                messages=list(messages), add_generation_prompt=prompt, **self.tokens
            )
            text.encode()  # half a surrogate pair in some field of a message is no text
            return text
        except RecursionError:
            raise TemplateError("recursion without an end") from None
        except Exception as error:  # templates run what they like: TypeError, KeyError and more
            raise TemplateError(" ".join(str(error).split())[:200]) from None


def _token(value: Any) -> str | None:  # noqa: ANN401 - any JSON value
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _taken_out(text: str) -> tuple[str, list[Span]]:
    """The text without the marks, and where they were."""
    parts = text.split(_BEGIN)
    whole = parts[0]
    spans: list[Span] = []
    for part in parts[1:]:
        inside, _, after = part.partition(_END)
        spans.append((len(whole), len(whole) + len(inside)))
        whole += inside + after
    return whole, spans


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - the library's attribute

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        """Put the marks around the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return _BEGIN + caller() + _END


@dataclasses.dataclass(frozen=True)
class _Compiled:
    render: Callable[..., str]
    tags: set[str]


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> _Compiled:
    """The template in a sandbox that lets it change nothing."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    tokens = environment.lex(template)
    names = {value for _, kind, value in tokens if kind == "name"}
    return _Compiled(
        environment.from_string(template, {"raise_exception": _refuse}).render,
        names & {"generation"},
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,  # noqa: ANN401 - any JSON value
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' filter of this name writes it."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
