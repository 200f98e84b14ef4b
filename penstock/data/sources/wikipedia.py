"""Encyclopedia articles: a MediaWiki XML dump, or the folders WikiExtractor leaves.

`data/sources` offers them as kind=wikipedia. A dump is read page by page: what is broken in one
leaves the others alone. It must never hold more than a page. Sources: MediaWiki's export format
(mediawiki.org/xml/export-0.10), through mwxml; WikiExtractor's `<doc …>` files.
"""

import dataclasses
import functools
import html
import io
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from penstock.config.data import SourceSection
from penstock.data.sources.decompression import compression_of, file_bytes
from penstock.data.sources.files import SourceFile
from penstock.data.sources.page_cleaner import CleaningError, PageCleaner
from penstock.data.sources.piece import Piece, Tally
from penstock.data.sources.wikitext import LEFT_OUT, missing_extra, strip_wikitext
from penstock.errors import DataError
from penstock.files import replacing

_BEGIN, _END = b"<page>", b"</page>"
_LARGEST_HEAD = 1 << 20
_LARGEST_PAGE = 64 << 20
_DEEPEST = 32
_TAG = re.compile(rb"<(/?)[a-zA-Z][^<>]*?(/?)>")
_DEFINITION = re.compile(rb"<!\s*(DOCTYPE|ENTITY)", re.IGNORECASE)
_NAMESPACE = re.compile(rb'<namespace key="(-?\d+)"[^>]*>([^<]*)</namespace>')
_FILES, _CATEGORIES, _MEDIA = 6, 14, -2
"""Numbers of namespaces, which every wiki names in its own language."""
_TITLE, _TEXT = re.compile(rb"<title>([^<]*)</title>"), re.compile(rb"<text[^>]*>([^<]*)<")
_DOCUMENT = re.compile(rb'<doc\b[^>\n]*\btitle="([^"\n]*)"[^>\n]*>[ \t]*\r?\n?')
_NO_SITE = b"<siteinfo></siteinfo>"
"""A dump may leave its site out; the parser wants one."""
_DOCUMENT_END = b"</doc>"


def cut_dump(
    file: SourceFile, section: SourceSection, size: int, folder: Path | None
) -> list[SourceFile]:
    """Ranges of about `size` bytes between pages; a compressed dump is unpacked into parts once.

    Raises:
        DataError: a dump with a document type definition, or no dump at all.
    """
    if (file.size <= size and compression_of(file.path) is None) or _is_extracted(file):
        return [file]
    head = _head(file)
    if compression_of(file.path) is not None:
        return [file] if folder is None else _unpacked(file, head, size, folder)
    bounds = [len(head)]
    with (
        Path(file.path).open("rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        while (at := content.find(_BEGIN, bounds[-1] + size)) >= 0:
            bounds.append(at)
    return [
        dataclasses.replace(file, start=start, end=end, size=end - start)
        for start, end in zip(bounds, [*bounds[1:], file.size], strict=True)
    ]


def _unpacked(file: SourceFile, head: bytes, size: int, folder: Path) -> list[SourceFile]:
    """The pages of a compressed dump in files of about `size` bytes, each with the dump's head."""
    target = folder / "dump" / re.sub(r"[^\w.-]", "_", file.id)
    target.mkdir(parents=True, exist_ok=True)
    done = target / "done"
    if not done.is_file():
        part: list[bytes] = []
        number = held = 0
        for page in _pages(file):
            part.append(page)
            held += len(page)
            if held >= size:
                _write_part(target / f"{number:06}.xml.zst", head, part)
                number, held, part = number + 1, 0, []
        if part or not number:
            _write_part(target / f"{number:06}.xml.zst", head, part)
        with replacing(done) as temporary:
            temporary.touch()
    return [
        SourceFile(f"{file.id}#{path.name}", str(path), path.stat().st_size, file.mtime_ns)
        for path in sorted(target.glob("*.xml.zst"))
    ]


def _write_part(path: Path, head: bytes, pages: list[bytes]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as handle:
        handle.write(zstandard.compress(head + b"\n".join(pages) + b"\n</mediawiki>\n", 1))


def read_articles(file: SourceFile, section: SourceSection, tally: Tally) -> Iterator[Piece]:
    """One document an article, its title on the first line; redirects and other pages left out.

    A page that the parser fails on, or takes longer than `source.page_seconds` over, is counted
    and stripped of its markup by simple rules.

    Raises:
        DataError: unreadable, no dump, or one with a document type definition.
        ConfigError: the extra is not installed.
    """
    if _is_extracted(file):
        yield from _extracted(file)
        return
    head = _head(file)
    left_out = _left_out(head)
    if b"<siteinfo" not in head:
        head += _NO_SITE
    cleaner = _cleaner(section.page_seconds)
    for page in _pages(file):
        tally.add("pages")
        parsed = _parsed(page, head, tally)
        if parsed is None:
            continue
        title, wikitext = parsed
        try:
            text = cleaner.clean(wikitext, left_out)
        except CleaningError as error:
            tally.add("pages stripped by simple rules", f"page {title}: {error}")
            text = strip_wikitext(wikitext)
        if text:
            yield Piece(title, f"{title}\n\n{text}", ends=True)
        else:
            tally.add("articles without text")


@functools.lru_cache(maxsize=1)
def _cleaner(seconds: float) -> PageCleaner:
    """One for all ranges that a process reads: to start it takes as long as a dozen pages."""
    return PageCleaner(seconds)


def _is_extracted(file: SourceFile) -> bool:
    """Whether a file is WikiExtractor's."""
    start = next(file_bytes(file.path), b"")
    return start.lstrip().startswith(b"<doc ")


def _extracted(file: SourceFile) -> Iterator[Piece]:
    """The articles between `<doc …>` and `</doc>`; the text begins with the title already."""
    rest = b""
    for chunk in file_bytes(file.path):
        *documents, rest = (rest + chunk).split(_DOCUMENT_END)
        for document in documents:
            found = _DOCUMENT.search(document)
            text = document[found.end() if found else 0 :].decode("utf-8", "replace").strip()
            name = found.group(1).decode("utf-8", "replace") if found else text.split("\n", 1)[0]
            title = html.unescape(name)
            body = text.removeprefix(title).strip()
            if body:
                yield Piece(title, f"{title}\n\n{body}", ends=True)


@functools.lru_cache(maxsize=4)
def _head(file: SourceFile) -> bytes:
    """What stands before the first page: the site's name and namespaces."""
    head = b""
    for chunk in file_bytes(file.path):
        head += chunk
        place = head.find(_BEGIN)
        found = _DEFINITION.search(head, 0, place if place >= 0 else len(head))
        if found:
            raise DataError(
                f"{file.path} defines {found.group(1).decode()}, which no MediaWiki dump does",
                where="source.path",
                do="do not use it",
            )
        if place >= 0:
            return head[:place]
        if len(head) > _LARGEST_HEAD:
            break
    if b"<mediawiki" in head[:_LARGEST_HEAD] and len(head) <= _LARGEST_HEAD:
        return head.partition(b"</mediawiki>")[0]
    raise DataError(
        f"{file.path} is no MediaWiki dump: it has no <page>",
        where="source.path",
        do="give a pages-articles dump, or WikiExtractor's folders",
    )


def _left_out(head: bytes) -> tuple[str, ...]:
    """Names of the namespaces whose links are no text, in the wiki's language too."""
    own = [
        html.unescape(name.decode("utf-8", "replace")).strip().lower()
        for key, name in _NAMESPACE.findall(head)
        if int(key) in (_FILES, _CATEGORIES, _MEDIA)
    ]
    return tuple(sorted({*LEFT_OUT, *own}))


def _pages(file: SourceFile) -> Iterator[bytes]:
    """Each page's XML, as it stands; one of more than 64 MiB is cut short."""
    position = file.start
    rest = b""
    for chunk in file_bytes(file.path, file.start):
        position += len(chunk)
        # What begins in the range belongs to it, wherever it ends.
        rest += chunk
        place = 0
        while (begin := rest.find(_BEGIN, place)) >= 0:
            if file.end is not None and position - len(rest) + begin >= file.end:
                return
            end = rest.find(_END, begin)
            if end < 0:
                break
            inner = rest.rfind(_BEGIN, begin + 1, end)
            if inner >= 0:  # a page that lacks its end stays by itself
                yield rest[begin:inner]
                begin = inner
            yield rest[begin : end + len(_END)]
            place = end + len(_END)
        rest = rest[begin:] if begin >= 0 else rest[max(place, len(rest) - len(_BEGIN)) :]
        if len(rest) > _LARGEST_PAGE:
            yield rest[:_LARGEST_PAGE]
            rest = b""
    if rest.startswith(_BEGIN) and (file.end is None or position - len(rest) < file.end):
        # The dump ends in a page.
        next_one = rest.find(_BEGIN, 1)
        yield rest[: next_one if next_one >= 0 else None]


def _parsed(page: bytes, head: bytes, tally: Tally) -> tuple[str, str] | None:
    """Title and wikitext of an article; None for pages that are none."""
    try:
        import mwxml  # noqa: PLC0415 - an extra
    except ImportError:
        raise missing_extra() from None
    try:
        if _depth(page) > _DEEPEST or _DEFINITION.search(page):
            raise ValueError("tags nested too deep, or definitions")
        dump: Any = mwxml.Dump.from_file(io.BytesIO(head + page + b"</mediawiki>"))
        found = next(iter(dump))
        if found.namespace != 0 or found.redirect is not None:
            return None
        *_, revision = found
        return str(found.title), str(revision.text or "")
    except Exception as error:  # the parser's own errors, and missing elements
        tally.add("pages with broken XML", f"{type(error).__name__}: {error}"[:200])
        title, text = _TITLE.search(page), _TEXT.search(page + b"<")
        if title is None or text is None or b"<redirect" in page or b"<ns>0</ns>" not in page:
            return None
        name, body = (html.unescape(m.group(1).decode("utf-8", "replace")) for m in (title, text))
        return name, body


def _depth(page: bytes) -> int:
    """How deep a page's tags are nested."""
    depth = deepest = 0
    for closes, alone in _TAG.findall(page):
        if not alone:
            depth += -1 if closes else 1
            deepest = max(deepest, depth)
    return deepest
