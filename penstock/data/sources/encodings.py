"""Bytes in any encoding as UTF-8 bytes, so that all else need only know UTF-8.

`sources/reading.py` reads through it. UTF-16 and UTF-32 are recognised by their byte-order mark
(Unicode standard, §23.8), which must never reach a document.
"""

import codecs
import itertools
from collections.abc import Iterator

from penstock.errors import ConfigError, DataError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UNMARKED = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}
"""What these names mean without a mark (WHATWG Encoding Standard, §4.2)."""
_LONGEST_MARK = 4


def encoding_of(start: bytes, wanted: str | None) -> tuple[str, int]:
    """The encoding of bytes that begin so, and the length of their byte-order mark.

    Raises:
        ConfigError: `wanted` is no text encoding.
    """
    named = None if wanted is None else _normalized(wanted)
    for mark, name in _MARKS:
        if start.startswith(mark) and (named is None or name.startswith(named)):
            return name, len(mark)
    return _UNMARKED.get(named or "utf-8", named or "utf-8"), 0


def _normalized(name: str) -> str:
    """Python's name of a text encoding."""
    try:
        "".encode(name)
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        raise ConfigError(
            f"{name!r} is no text encoding", where="source.encoding", do="use utf-8, cp1252, …"
        ) from None


def as_utf8(chunks: Iterator[bytes], wanted: str | None, errors: str, path: str) -> Iterator[bytes]:
    """A whole file's bytes as UTF-8, without a byte-order mark; those of UTF-8 pass unchecked.

    `errors`: strict or replace, for what is not of another encoding.

    Raises:
        DataError: bytes that are not of the encoding, with errors=strict.
    """
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _LONGEST_MARK:
            break
    name, mark = encoding_of(head, wanted)
    chunks = itertools.chain([head[mark:]], chunks)
    yield from chunks if name == "utf-8" else _transcoded(chunks, name, errors, path, mark)


def _transcoded(
    chunks: Iterator[bytes], name: str, errors: str, path: str, offset: int
) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(name)(errors)
    for chunk in itertools.chain(chunks, [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeError as error:  # some codecs raise it bare
            place = offset
            if isinstance(error, UnicodeDecodeError):
                place += len(chunk) - len(error.object) + error.start
            raise DataError(
                f"{path} is not {name} at byte {place}",
                where="source.encoding",
                do="name its encoding, or set source.on_error=replace or skip",
            ) from None
        offset += len(chunk)
        # Python's own UTF-32 and UTF-16 decoders refuse lone surrogates; others may let them by.
        yield text.encode("utf-8", "replace")
