"""Wikitext to plain text: templates, tables, references, files and categories gone, the rest kept.

The process that `sources/page_cleaner.py` starts parses with it. It must never read a file.
Sources: MediaWiki's markup (mediawiki.org/wiki/Help:Formatting), parsed by mwparserfromhell.
"""

import collections
import html
import re
from collections.abc import Iterable, Iterator
from typing import Any

from penstock.errors import ConfigError

LEFT_OUT = ("file", "image", "category", "media")
"""Namespaces whose links are no text; a wiki's own names for them are added."""
_NO_TEXT = {
    "ce",
    "chem",
    "gallery",
    "graph",
    "hiero",
    "imagemap",
    "includeonly",
    "indicator",
    "inputbox",
    "mapframe",
    "maplink",
    "math",
    "ref",
    "references",
    "score",
    "section",
    "style",
    "table",
    "templatedata",
    "templatestyles",
    "timeline",
}
"""Tags of which nothing is read as prose."""
_ITEMS = {"li": "- ", "dt": "", "dd": ""}
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*\s*:\S")
_STYLE = re.compile(r"'{2,5}")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_EMPTY_BRACKETS = re.compile(r"[ \t]?\(\s*(?:[;,:–-]\s*)*\)")
_LEADING = re.compile(r"\(\s*[;,:]+\s*")
_TRAILING = re.compile(r"[;,:][ \t]+\)")
_BEFORE_STOP = re.compile(r" ([,.])(?=\s|$)")
_COMMAS = re.compile(r"(?<!,),{2,}(?=\s|$)")
_INNER_ITEM = re.compile(r"^(?:- ){2,}")
_SPACES = re.compile(r"[ \t\u00a0]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_BARE_ITEM = re.compile(r"[-*#:;\s]*")
_HEADING = "\ue010"
"""Stands before a heading's level and text until sections without text are taken out."""
_TOKEN = re.compile(
    r"<!--|-->|<(?P<open>ref|math|gallery|timeline)\b[^<>]{0,1000}?(?P<single>/)?>"
    r"|</(?P<close>ref|math|gallery|timeline)\s*>|\{\{|\}\}|\{\||\|\}(?!\})"
    r"|(?P<tag></?[a-zA-Z][^<>]{0,1000}>)"
)
_CLOSERS = {"<!--": "-->", "{{": "}}", "{|": "|}"}
_LITERAL = ("-->", "math", "timeline")
"""Inside these nothing but their own end is markup."""
_FOREIGN = re.compile(
    r"\{\{\s{0,9}(?:lang|transl|nowrap)\s{0,9}\|(?:[^{}|=\[\]]{0,40}\|){0,3}"
    r"((?:[^{}|=\[\]]|\[\[[^{}\[\]]{1,200}\]\]){1,500})\}\}",
    re.IGNORECASE,
)
"""Templates that only say how their last part is to be shown."""
_ONLY_PARSED = re.compile(r"\{\{\{|<(?:nowiki|pre|source|syntaxhighlight|code)\b", re.I)
"""Where braces may be no markup, or more than that."""
_LINK = re.compile(r"\[\[(?:[^\[\]|]{0,500}\|)*([^\[\]|]{0,2000})\]\]")
_LEFT_LINK = re.compile(
    r"\[\[\s*(?:" + "|".join(LEFT_OUT) + r")\s*:[^\[\]]{0,5000}\]\]", re.IGNORECASE
)
_URL = re.compile(r"\[(?:https?:)?//[^\s\[\]]{1,2000}\s?([^\[\]]{0,2000})\]")


def parse_wikitext(text: str, left_out: Iterable[str]) -> str:
    """The prose of a page, headings on lines of their own, items of lists behind a dash.

    `left_out`: lower-case names of namespaces whose links are left out.

    Raises:
        ConfigError: mwparserfromhell is not installed.
    """
    try:
        import mwparserfromhell  # noqa: PLC0415 - an extra
    except ImportError:
        raise missing_extra() from None
    text = _FOREIGN.sub(r"\1", text)
    # Most of a page's markup is in templates, tables and references, of which nothing is kept:
    # where all of them pair up, they go before the parser sees them, in a fifth of the time.
    bare = None if _ONLY_PARSED.search(text) else _outside(text, strict=True)
    code = mwparserfromhell.parse(text if bare is None else bare, skip_style_tags=True)
    found = "".join(_walk(code.nodes, frozenset(left_out)))
    # What the parser could not pair (a brace too many) it gives back as text.
    return _tidy(_outside(found) or "" if bare is None else found)


def missing_extra() -> ConfigError:
    """The error where the libraries for dumps are not installed."""
    return ConfigError(
        "reading a MediaWiki dump needs mwxml and mwparserfromhell",
        where="source.kind=wikipedia",
        do="pip install 'penstock[wikipedia]'",
    )


def _walk(nodes: Iterable[Any], left_out: frozenset[str]) -> Iterator[str]:
    """The text of parsed nodes; their classes are told by name, as the library is an extra."""
    for node in nodes:
        kind = type(node).__name__
        if kind == "Text":
            yield node.value
        elif kind == "Wikilink":
            yield from _link(node, left_out)
        elif kind == "Tag":
            yield from _tag(node, left_out)
        elif kind == "Heading":
            title = _SPACES.sub(" ", "".join(_walk(node.title.nodes, left_out))).strip()
            yield f"\n\n{_HEADING}{node.level}{title}\n\n"
        elif kind == "HTMLEntity":
            yield html.unescape(str(node))
        elif kind == "ExternalLink":
            if node.title is not None:
                yield from _walk(node.title.nodes, left_out)
            elif not node.brackets:
                yield str(node.url)


def _link(node: Any, left_out: frozenset[str]) -> Iterator[str]:  # noqa: ANN401 - the extra's type
    title = str(node.title).strip()
    name = title.partition(":")[0].strip().lower()
    if name in left_out or _LANGUAGE.match(title):
        return
    if node.text is not None:
        yield from _walk(node.text.nodes, left_out)
    else:
        yield html.unescape(title.lstrip(":"))


def _tag(node: Any, left_out: frozenset[str]) -> Iterator[str]:  # noqa: ANN401 - the extra's type
    name = str(node.tag).strip().lower()
    if name in _NO_TEXT:
        return
    if name == "br":
        yield "\n"
    elif name in _ITEMS and node.wiki_markup:
        yield _ITEMS[name]
    elif node.contents is not None:
        yield from _walk(node.contents.nodes, left_out)


def strip_wikitext(text: str) -> str:
    """The prose of a page by simple rules, in time proportional to its length.

    For pages that the parser cannot do.
    """
    text = _outside(_FOREIGN.sub(r"\1", text)) or ""
    for _ in range(3):
        text = _LINK.sub(r"\1", _LEFT_LINK.sub("", text))
    lines = _URL.sub(r"\1", text).split("\n")
    plain = (line.strip().strip("=") if line.startswith("=") else line for line in lines)
    return _tidy(html.unescape("\n".join(plain)))


class _Open:
    """What has been opened and not yet closed, in order."""

    def __init__(self) -> None:
        self.closers: list[str] = []
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, closer: str) -> None:
        """Something begins that `closer` ends."""
        self.closers.append(closer)
        self._counts[closer] += 1

    def close(self, token: str) -> bool:
        """End the last that `token` ends, with all in it; whether that was in its place."""
        if not self._counts[token]:
            return False
        in_place = self.closers[-1] == token
        while True:
            last = self.closers.pop()
            self._counts[last] -= 1
            if last == token:
                return in_place


def _outside(text: str, *, strict: bool = False) -> str | None:
    """The text outside templates, tables, comments and references.

    `strict`: None where these do not pair up, and other tags are kept; else an outer end closes
    what was left open inside it, and all tags go.
    """
    kept: list[str] = []
    opened = _Open()
    closers = opened.closers
    place = 0
    for found in _TOKEN.finditer(text):
        token = found["close"] or found.group()
        if closers and closers[-1] in _LITERAL and token != closers[-1]:
            continue
        if not closers:
            kept += [text[place : found.start()], token if strict and found["tag"] else ""]
        place = found.end()
        if found["tag"] or found["single"]:
            continue
        closer = _CLOSERS.get(token) or found["open"]
        if closer:
            opened.add(closer)
        elif not opened.close(token) and strict:
            return None
    if not closers:
        kept.append(text[place:])
    return None if strict and closers else "".join(kept)


def _tidy_line(line: str) -> str:
    """One space at a time, and none where something was taken out before a stop or in brackets;
    items of lists within lists are set in.
    """
    line = _SPACES.sub(" ", line).strip().replace("( ", "(")
    line = _COMMAS.sub(",", _BEFORE_STOP.sub(r"\1", line))
    return _INNER_ITEM.sub(lambda dashes: " " * (len(dashes.group()) - 2) + "- ", line)


def _tidy(text: str) -> str:
    """Spaces, brackets and lines that what was taken out has left empty; empty sections too."""
    text = _MAGIC_WORD.sub("", _STYLE.sub("", text))
    text = _TRAILING.sub(")", _LEADING.sub("(", _EMPTY_BRACKETS.sub("", text)))
    lines = (_tidy_line(line) for line in text.split("\n"))
    kept: list[str] = []
    headings: list[tuple[int, str]] = []
    for line in lines:
        if line.startswith(_HEADING):
            level = int(line[1])
            headings = [(n, title) for n, title in headings if n < level]
            headings.append((level, line[2:]))
            kept.append("")
        elif line and not _BARE_ITEM.fullmatch(line):
            for _, title in headings:
                kept += ["", title, ""]
            headings = []
            kept.append(line)
        elif not line:
            kept.append("")
    return _BLANK_LINES.sub("\n\n", "\n".join(kept)).strip()
