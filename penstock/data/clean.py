"""Documents cleaned one by one: normalized, or left out by length, characters or language.

Between a source and the tokenizer; what depends on other documents is in `duplicates.py`. A pure
function of each document. It must never read a file.
"""

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from penstock.config.cleaning import CleanSection
from penstock.data.sources.piece import Piece, Tally
from penstock.errors import ConfigError

_JUDGED_CHARACTERS = 1 << 20
"""A document is judged by so much of its beginning; no limit on lengths lies beyond it."""


def judges(section: CleanSection) -> bool:
    """Whether whole documents must be seen, so that none may be cut over shards."""
    default = CleanSection()
    names = (
        "min_characters",
        "max_characters",
        "min_letters",
        "max_digits",
        "max_symbols",
        "languages",
    )
    return any(getattr(section, name) != getattr(default, name) for name in names)


def clean(pieces: Iterable[Piece], section: CleanSection, tally: Tally) -> Iterator[Piece]:
    """The documents that are kept, normalized; the others are counted by what was against them.

    Raises:
        ConfigError: the extra for languages is not installed.
    """
    if section.unicode is not None:
        pieces = (_normalized(piece, section.unicode.upper(), tally) for piece in pieces)
    return _judged(pieces, section, tally) if judges(section) else iter(pieces)


def _normalized(piece: Piece, form: Any, tally: Tally) -> Piece:  # noqa: ANN401 - one of four names
    """The piece with all its texts in a normalization form.

    Pieces of a document are cut beside white space, where no two characters combine.
    """
    normal: Callable[[str], str] = functools.partial(unicodedata.normalize, form)
    text = normal(piece.text)
    if text == piece.text:
        return piece
    tally.add("pieces of text normalized")
    return dataclasses.replace(
        piece,
        text=text,
        pairs=tuple((normal(prompt), normal(told)) for prompt, told in piece.pairs),
        messages=tuple({**m, "content": normal(str(m["content"]))} for m in piece.messages),
    )


def _judged(pieces: Iterable[Piece], section: CleanSection, tally: Tally) -> Iterator[Piece]:
    """Documents as they come, each held back until enough of it is there to be judged."""
    pieces = iter(pieces)
    for first in pieces:
        held, size = [first], len(first.text)
        while not held[-1].ends and size < _JUDGED_CHARACTERS:
            following = next(pieces, None)
            if following is None:
                break
            held.append(following)
            size += len(following.text)
        rest = _until_end(pieces) if not held[-1].ends else iter(())
        start = "".join(piece.text for piece in held)[:_JUDGED_CHARACTERS]
        against = _against(start, size, section)
        if against is None:
            yield from itertools.chain(held, rest)
        else:
            tally.add(against)
            for _ in rest:
                pass


def _until_end(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The rest of a document."""
    for piece in pieces:
        yield piece
        if piece.ends:
            return


def _against(text: str, size: int, section: CleanSection) -> str | None:
    """What is against a document; None: nothing."""
    letters, digits, symbols = _shares(text)
    reasons = {
        "too short": size < section.min_characters,
        "too long": section.max_characters is not None and size > section.max_characters,
        "too few letters": letters < section.min_letters,
        "too many digits": digits > section.max_digits,
        "too many symbols": symbols > section.max_symbols,
    }
    reason = next((name for name, holds in reasons.items() if holds), None)
    if reason is None and section.languages:
        language, probability = _language(text)
        if language not in section.languages:
            reason = f"in {language}"
        elif probability < section.min_language_probability:
            reason = "in no certain language"
    return None if reason is None else f"documents left out: {reason}"


def _shares(text: str) -> tuple[float, float, float]:
    """Shares of letters, digits and symbols among characters that are not white space."""
    # One count a distinct character: texts repeat few of them.
    counts = {character: text.count(character) for character in set(text)}
    letters = digits = symbols = total = 0
    for character, count in counts.items():
        if character.isspace():
            continue
        total += count
        kind = unicodedata.category(character)[0]
        if kind == "L":
            letters += count
        elif kind == "N":
            digits += count
        elif kind != "M":
            symbols += count
    return letters / max(1, total), digits / max(1, total), symbols / max(1, total)


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:  # noqa: ANN401 - the extra's type
    try:
        from py3langid.langid import (  # noqa: PLC0415 - an extra
            MODEL_FILE,
            LanguageIdentifier,
        )
    except ImportError:
        raise ConfigError(
            "telling languages needs py3langid",
            where="clean.languages",
            do="pip install 'penstock[language]'",
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


_LANGUAGE_CHARACTERS = 10_000
"""More text makes no difference to which language is found."""


def _language(text: str) -> tuple[str, float]:
    """The most probable language of a text, by ISO 639-1 code."""
    language, probability = _identifier().classify(text[:_LANGUAGE_CHARACTERS])
    return str(language), float(probability)
