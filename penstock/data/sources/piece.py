"""What a source yields: documents, the long ones in pieces, and a tally of what went wrong.

Every kind of source yields these; `data/encode.py` turns them into tokens. It must never read.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

Pair = tuple[str, str]
"""A prompt, which may be empty, and its completion."""
Message = Mapping[str, Any]
"""One message of a chat: at least `role` and `content`."""
READ = frozenset({"pages", "pieces of text normalized"})
"""What a tally counts that is no loss and no defect."""
NO_CATEGORY = -1
"""Of what has none, and of padding."""
_NAMED = 5
"""Places of broken records that are remembered of each unit of work."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document's text; long documents come in several."""

    document: str
    """Stable id: the file's for documents=file, else the (start of the) text itself, so that
    equal lines or paragraphs never lie in two splits."""
    text: str
    """The text; of pairs and chats, all of it with newlines between."""
    ends: bool
    """Whether the document ends here."""
    pairs: tuple[Pair, ...] = ()
    """Prompts and completions, where the document is made of them; it is one piece then."""
    messages: tuple[Message, ...] = ()
    """Messages, where the document is a chat; it is one piece then."""
    begins: bool = True
    """Whether the document begins here."""
    categories: tuple[int, ...] = ()
    """The category of each pair, or of the whole document, where they are asked for."""


@dataclasses.dataclass
class Tally:
    """What a source left out or mended, by name, and where the first cases are."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    places: list[str] = dataclasses.field(default_factory=list)

    def add(self, what: str, place: str | None = None) -> None:
        """Count one case."""
        self.counts[what] += 1
        if place is not None and len(self.places) < _NAMED:
            self.places.append(place)
