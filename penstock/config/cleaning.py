"""The section of the configuration that says what `prepare` cleans away before it tokenizes.

`config/schema.py` gathers it. It must never know how text is cleaned.
"""

from typing import Literal

from pydantic import Field

from penstock.config.section import Section

_LONGEST = 1 << 20


class CleanSection(Section):
    """What `prepare` cleans; nothing unless it is set. What is left out is counted."""

    unicode: Literal["nfc", "nfd", "nfkc", "nfkd"] | None = None
    """Unicode normalization form of the text (Unicode standard annex 15)."""
    exact_duplicates: bool = False
    """Whether a document equal to an earlier one, in any split, is left out."""
    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    """Left out: documents whose five-token sequences have this Jaccard similarity or more with an
    earlier document's, estimated by MinHash; 0.8 is usual."""
    min_characters: int = Field(default=0, ge=0, le=_LONGEST)
    """Shortest document kept, in characters."""
    max_characters: int | None = Field(default=None, ge=1, le=_LONGEST)
    """Longest document kept, in characters."""
    min_letters: float = Field(default=0.0, ge=0, le=1)
    """Smallest share of letters among a document's characters that are not white space."""
    max_digits: float = Field(default=1.0, ge=0, le=1)
    """Largest share of digits among them."""
    max_symbols: float = Field(default=1.0, ge=0, le=1)
    """Largest share of characters among them that are neither letters, digits nor marks."""
    languages: tuple[str, ...] = ()
    """Languages kept, by ISO 639-1 code, such as [en,de]; needs the extra `language`."""
    min_language_probability: float = Field(default=0.0, ge=0, le=1)
    """How probable a document's language must be; what is less probable is left out."""
