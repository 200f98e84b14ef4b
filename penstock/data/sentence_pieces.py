"""Tokenizers from SentencePiece's model files: byte-pair ones, such as Llama 2's.

`data/tokenizer.py` reads a tokenizer.model with it. It must never run what a file says, and trusts
none of its lengths.

Source: google/sentencepiece, src/sentencepiece_model.proto; the tokenizer.json that `transformers`
publishes beside such a file has the same pieces, and a merge for every way to make a piece of two,
the best pieces first.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers

from penstock.data.special_tokens import put_in_front
from penstock.errors import DataError

_BPE = 2
_ORDINARY = 1
_SPACE = "▁"
_UNKNOWN, _BEGIN, _END = "<unk>", "<s>", "</s>"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read_sentence_pieces(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.model; it puts <s> before a text.

    Raises:
        DataError: a damaged file, or another kind of model than byte pairs with <s> and </s>.
    """
    try:
        kind, pieces = _read(path.read_bytes())
    except (ValueError, IndexError, struct.error, OverflowError, TypeError) as error:
        raise _unreadable(path, f"is damaged: {error}") from None
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    if kind != _BPE or not {_UNKNOWN, _BEGIN, _END} <= ids.keys():
        raise _unreadable(path, "is no byte-pair model with <unk>, <s> and </s>")
    inner = tokenizers.Tokenizer(
        models.BPE(ids, _merges(pieces, ids), unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    inner.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens([_UNKNOWN, _BEGIN, _END])
    put_in_front(inner, _BEGIN)
    return inner


def _merges(pieces: list[_Piece], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best pieces first."""
    ordinary = {piece.text: piece.score for piece in pieces if piece.kind == _ORDINARY}
    found = [
        (-score, ids[text[:cut]], ids[text[cut:]], text[:cut], text[cut:])
        for text, score in ordinary.items()
        for cut in range(1, len(text))
        if text[:cut] in ordinary and text[cut:] in ordinary
    ]
    found.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in found]


def _read(data: bytes) -> tuple[int, list[_Piece]]:
    """The kind of model, and its pieces in the order of their ids."""
    kind, pieces = 1, list[_Piece]()  # without a word of it, a unigram model
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            content = dict(_fields(value))
            text, score = content[1], content.get(2, b"\0\0\0\0")
            if not isinstance(text, bytes) or not isinstance(score, bytes):
                raise ValueError("a piece is no text with a score")
            told = content.get(3, _ORDINARY)
            pieces.append(_Piece(text.decode(), struct.unpack("<f", score)[0], int(told)))
        elif number == 2 and isinstance(value, bytes):
            kind = int(dict(_fields(value)).get(3, 1))
    return kind, pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol buffer's message."""
    place = 0

    def integer() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("an integer does not end")

    while place < len(data):
        number, kind = divmod(integer(), 8)
        if kind == _VARINT:
            yield number, integer()
            continue
        if kind not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"a field of kind {kind}")
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind) or integer()
        if size > len(data) - place:
            raise ValueError("it ends early")
        yield number, data[place : place + size]
        place += size


def _unreadable(path: Path, how: str) -> DataError:
    return DataError(
        f"{path} {how}",
        where="tokenizer.from",
        do="give the tokenizer.json that belongs to it",
    )
