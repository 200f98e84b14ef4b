"""Records (texts, prompts with completions, chats) as documents: what each field means.

`sources/tables.py` and `sources/hub.py` hand it what they read. Broken records are left out,
mended or refused as `source.on_error` says. It must never read a file.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from penstock.config.data import SourceSection
from penstock.data.sources.piece import NO_CATEGORY, Message, Pair, Piece, Tally
from penstock.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
"""OpenAI's names of a message's fields, and ShareGPT's."""
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


class RecordError(Exception):
    """A record that is not of the form it should have; says why."""


def to_piece(record: Any, section: SourceSection) -> Piece | None:  # noqa: ANN401 - JSON of any kind
    """A record as a document; None where it has no text at all.

    Raises:
        RecordError: it is none.
    """
    piece = _to_piece(record, section)
    if piece is None or section.category_key is None:
        return piece
    ones = record if isinstance(record, list) else [record]
    categories = tuple(_category(one, section.category_key, section.categories) for one in ones)
    return dataclasses.replace(piece, categories=categories)


def _to_piece(record: Any, section: SourceSection) -> Piece | None:  # noqa: ANN401 - JSON of any kind
    if isinstance(record, list):
        return _paired(tuple(_pair(one, section) for one in record))
    if not isinstance(record, Mapping):
        raise RecordError("is no object")
    if _has(record, section.completion_key):
        return _paired((_pair(record, section),))
    if _has(record, section.messages_key):
        return _chat(record[section.messages_key], section)
    if _has(record, section.text_key):
        text = _text(record, section.text_key, section)
        return Piece(text, text, ends=True) if text.strip() else None
    if _has(record, section.prompt_key):
        return _paired(((_text(record, section.prompt_key, section), ""),))
    keys = (section.text_key, section.completion_key, section.messages_key)
    raise RecordError(f"has none of the fields {', '.join(keys)}")


def _category(record: Mapping[str, Any], key: str, names: Sequence[str] | None) -> int:
    """The number of a record's category, found by its name where there are `names`."""
    value = record.get(key)
    if value is None:
        return NO_CATEGORY
    if names is not None:
        if value not in names:
            raise RecordError(f"has a field {key} that is none of source.categories: {value!r:.60}")
        return names.index(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise RecordError(f"has a field {key} that is no number of a category")
    return value


Place = Callable[[], str]
"""Tells where a record is; asked only about broken ones, since to count lines takes time."""


def pieces_of(
    records: Iterable[tuple[Place, Any]], section: SourceSection, tally: Tally
) -> Iterator[Piece]:
    """Documents of records; a `RecordError` stands for a record that did not read.

    Raises:
        DataError: a broken record with on_error=stop.
    """
    for place, record in records:
        try:
            if isinstance(record, RecordError):
                raise record
            piece = to_piece(record, section)
        except RecordError as error:
            _keep_going(error, place(), section, tally)
            continue
        if piece is None:
            tally.add("records without text")
        else:
            yield piece


def _keep_going(error: RecordError, place: str, section: SourceSection, tally: Tally) -> None:
    """Count a broken record, or stop at it."""
    if section.on_error == "stop":
        raise DataError(
            f"the record {error}",
            where=place,
            do="mend it, set source.text_key and the like, or source.on_error=skip",
        )
    tally.add("broken records left out", f"{place}: {error}")


def _has(record: Mapping[str, Any], key: str) -> bool:
    return record.get(key) is not None


def _text(record: Mapping[str, Any], key: str, section: SourceSection) -> str:
    """One field's text, all of it Unicode characters."""
    value = record.get(key)
    if not isinstance(value, str):
        raise RecordError(f"has a field {key} that is no text")
    if _SURROGATE.search(value):
        if section.on_error != "replace":
            raise RecordError(f"has half a surrogate pair in {key}")
        value = _SURROGATE.sub("\ufffd", value)
    return value


def _pair(record: Any, section: SourceSection) -> Pair:  # noqa: ANN401 - JSON of any kind
    if not isinstance(record, Mapping) or not _has(record, section.completion_key):
        raise RecordError(f"has a pair without {section.completion_key}")
    prompt = section.prompt_key
    return (
        _text(record, prompt, section) if _has(record, prompt) else "",
        _text(record, section.completion_key, section),
    )


def _paired(pairs: tuple[Pair, ...]) -> Piece | None:
    texts = [text for pair in pairs for text in pair if text]
    if not texts:
        return None
    return Piece("\0".join(text for pair in pairs for text in pair), "\n".join(texts), True, pairs)


def _chat(value: Any, section: SourceSection) -> Piece | None:  # noqa: ANN401 - JSON of any kind
    if not isinstance(value, list):
        raise RecordError(f"has a field {section.messages_key} that is no list")
    messages = tuple(_message(one, section) for one in value)
    texts = [str(message["content"]) for message in messages if message["content"]]
    if not texts:
        return None
    name = "\0".join(f"{message['role']}\0{message['content']}" for message in messages)
    return Piece(name, "\n".join(texts), True, messages=messages)


def _message(value: Any, section: SourceSection) -> Message:  # noqa: ANN401 - JSON of any kind
    """One message with the names templates use."""
    if not isinstance(value, Mapping):
        raise RecordError("has a message that is no object")
    told = next((key for key in _ROLE_KEYS if key in value), None)
    key = next((key for key in _CONTENT_KEYS if value.get(key) is not None), None)
    if told is None or key is None:
        raise RecordError("has a message without a role or a content")
    role = _text(value, told, section)
    rest = {k: v for k, v in value.items() if k not in (*_ROLE_KEYS, *_CONTENT_KEYS)}
    return {**rest, "role": _ROLES.get(role, role), "content": _text(value, key, section)}
