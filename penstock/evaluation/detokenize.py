"""WikiText's tokenised text turned back into plain text, as its perplexities are computed.

The `wikitext` task calls it. Source of the rules and their order: NVIDIA/Megatron-LM
(tasks/zeroshot_gpt/detokenizer.py), which Graphcore's evaluation uses too.
"""

import re

_REPLACED = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_INSIDE = tuple(
    (re.compile(rf"{re.escape(left)}\s*([^{inner}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}")
    for left, right, inner in (
        ("(", ")", r"\)"),
        ("[", "]", r"\]"),
        ("{", "}", r"}"),
        ('"', '"', r'"'),
        ("'", "'", r"'"),
    )
)
"""Spaces just inside brackets and quotation marks."""
_REPLACED_AFTER = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize_wikitext(text: str) -> str:
    """Plain text of WikiText's tokens."""
    # The last rules have chr(176), the degree sign, between spaces.
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for pattern, new in _INSIDE:
        text = pattern.sub(new, text)
    for old, new in _REPLACED_AFTER:
        text = text.replace(old, new)
    return text
