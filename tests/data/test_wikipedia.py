"""Encyclopedia articles: real ones, crafted ones, broken ones, and none that stops the work."""

import bz2
import html
import re
from pathlib import Path

import pytest

import penstock
from penstock.config.data import SourceSection
from penstock.data.sources import SOURCES, read_documents
from penstock.data.sources import page_cleaner as page_cleaner_module
from penstock.data.sources import wikipedia as wikipedia_module
from penstock.data.sources.page_cleaner import CleaningError, PageCleaner
from penstock.data.sources.piece import Piece, Tally
from penstock.data.sources.wikitext import LEFT_OUT, parse_wikitext, strip_wikitext
from penstock.errors import DataError

ROOT = Path(__file__).parents[2]
HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="de">
<siteinfo><sitename>Wikipedia</sitename><dbname>dewiki</dbname><namespaces>
<namespace key="0" case="first-letter" /><namespace key="1" case="first-letter">Diskussion</namespace>
<namespace key="6" case="first-letter">Datei</namespace>
<namespace key="14" case="first-letter">Kategorie</namespace></namespaces></siteinfo>
"""
PAGE = """<page><title>{title}</title><ns>{ns}</ns><id>{id}</id>{redirect}<revision><id>1</id>
<timestamp>2016-04-22T10:19:33Z</timestamp><contributor><ip>::1</ip></contributor>
<model>wikitext</model><format>text/x-wiki</format><text xml:space="preserve">{text}</text>
</revision></page>
"""


def page(title: str, text: str, ns: int = 0, redirect: str = "") -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return PAGE.format(title=title, text=text, ns=ns, id=len(title), redirect=redirect)


def dump(path: Path, *pages: str) -> Path:
    path.write_text(HEAD + "".join(pages) + "</mediawiki>\n", encoding="utf-8")
    return path


def read(path: Path, size: int = 1 << 30, **keys: object) -> tuple[list[Piece], Tally]:
    section = SourceSection(kind="wikipedia", path=str(path), **keys)
    source, tally = SOURCES["wikipedia"], Tally()
    parts = [
        part
        for file in source.files(section)
        for part in source.cut(file, section, size, path.parent / "work")
    ]
    return [piece for part in parts for piece in read_documents(part, section, tally)], tally


@pytest.mark.data
def test_a_real_dump_is_prose_with_headings_and_lists(test_data: Path, tmp_path: Path) -> None:
    raw = test_data / "wikipedia" / "enwiki-shortened.xml.bz2"
    copy = tmp_path / "dump.xml.bz2"
    # The first fifty articles or so: parsing all takes seconds.
    xml = bz2.decompress(raw.read_bytes())
    copy.write_bytes(bz2.compress(xml[: xml.index(b"</page>", 2_000_000) + 7] + b"</mediawiki>"))
    pieces, tally = read(copy)
    assert len(pieces) > 20
    assert tally.counts["pages"] == xml[:2_000_000].count(b"<page>")
    assert not tally.places
    text = "\n".join(piece.text for piece in pieces)
    for markup in ("{{", "}}", "{|", "|}", "[[", "]]", "<ref", "</", "'''", "Category:", "File:"):
        assert markup not in text, markup
    anarchism = pieces[0].text
    assert anarchism.startswith("Anarchism\n\nAnarchism is a political philosophy that advocates")
    assert "\n\nEtymology and terminology\n\nThe term anarchism is a compound word" in anarchism
    assert re.search(r"\n- \w", text)
    # Ranges of the plain dump, and parts of the packed one, hold the same articles.
    (tmp_path / "dump.xml").write_bytes(
        bz2.decompress(copy.read_bytes())[:700_000] + b"</mediawiki>"
    )
    (tmp_path / "again.bz2").write_bytes(bz2.compress((tmp_path / "dump.xml").read_bytes()))
    whole, _ = read(tmp_path / "dump.xml")
    assert whole == read(tmp_path / "dump.xml", size=100_000)[0]
    assert whole == read(tmp_path / "again.bz2", size=100_000)[0]


MARKUP = """{{Infobox|a=[[x]]|b={{c|}}|d=|}}<!-- a {{ comment -->'''Bold''' and ''italic'' [[link|text]]s,
[[plain]]{{cite|x}}<ref name="a">gone {{x}}</ref><ref name="a" /> &amp; more ({{IPA|x}}; ).
[[Datei:pic.jpg|thumb|a [[nested]] caption]][[File:b.jpg]] [[:Kategorie:shown]] {{lang|grc|λόγος}} {{lang|ja|[[wikt:en:合|合]]}}
{| class="wikitable"
| gone || {{x}}
|}
== Heading ''one'' ==
* first
* second [https://example.org titled] https://bare.example
# third
=== Empty ===
{{only|templates}}
== References ==
<references/>
[[Kategorie:gone]]
[[en:Gone]]
__NOTOC__ <math>\\frac{{a}}{b}</math><br/>end"""
PROSE = """Bold and italic texts,
plain & more.
:Kategorie:shown λόγος 合

Heading one

- first
- second titled https://bare.example
- third"""


def test_markup_becomes_prose() -> None:
    names = (*LEFT_OUT, "datei", "kategorie")
    made = parse_wikitext(MARKUP, names)
    assert made.startswith(PROSE.replace(":Kategorie", "Kategorie")), made
    for gone in ("gone", "Gone", "thumb", "caption", "Empty", "NOTOC", "frac", "Infobox"):
        assert gone not in made
    stripped = strip_wikitext(MARKUP)
    for kept in ("Bold and italic texts,", "Heading one", "first", "second titled", "end"):
        assert kept in stripped
    for gone in ("gone {{", "cite", "Infobox", "{|", "thumb", "<"):
        assert gone not in stripped


@pytest.mark.parametrize(
    "text",
    [
        "{{" * 50_000,
        "[[" * 50_000,
        "{|" * 50_000,
        "<ref>" * 50_000,
        "'" * 100_000,
        "{{a|" * 20_000 + "}}" * 20_000,
        "<!--" * 50_000,
        "==" * 50_000,
        "* " * 50_000,
        "," * 100_000,
        " ," * 50_000,
        "( " * 50_000,
    ],
)
def test_simple_rules_take_time_in_proportion(text: str) -> None:
    assert isinstance(strip_wikitext(text + " words"), str)


def test_only_articles_are_read(tmp_path: Path) -> None:
    path = dump(
        tmp_path / "d.xml",
        page("One", "The first."),
        page("Old", "#REDIRECT [[One]]", redirect='<redirect title="One" />'),
        page("Diskussion:One", "Talk.", ns=1),
        page("Two &amp; more", "[[Kategorie:X]]The '''second''' 🙂 שלום."),
        page("Nothing", "{{only|a template}}"),
    )
    pieces, tally = read(path)
    assert [p.text for p in pieces] == ["One\n\nThe first.", "Two & more\n\nThe second 🙂 שלום."]
    assert tally.counts == {"pages": 5, "articles without text": 1}


def test_broken_pages_harm_no_others(tmp_path: Path) -> None:
    deep = "<a>" * 100_000
    broken = [
        page("Entity", "text").replace("text</text>", "text &lol; more</text>"),
        page("Cut", "cut text").replace("</revision></page>", ""),
        PAGE.format(title="Deep", ns=0, id=1, redirect="", text=deep),
        page("Tags", "tags").replace("tags</text>", "tags</oops>"),
    ]
    good = [page(f"Good {i}", f"Text {i}.") for i in range(5)]
    pages = [p for pair in zip(good, broken, strict=False) for p in pair] + good[4:]
    pieces, tally = read(dump(tmp_path / "d.xml", *pages))
    found = {piece.document: piece.text for piece in pieces}
    assert {f"Good {i}" for i in range(5)} <= set(found)
    assert tally.counts["pages with broken XML"] == 4
    assert found["Cut"] == "Cut\n\ncut text"
    assert "text" in found["Entity"]


def test_a_dump_that_ends_in_a_page_keeps_what_there_is_of_it(tmp_path: Path) -> None:
    whole = [page(f"Good {i}", f"Text {i}. " + "More words. " * 40) for i in range(9)]
    path = dump(tmp_path / "d.xml", *whole)
    xml = path.read_bytes()
    path.write_bytes(xml[: xml.rindex(b"words.")])
    pieces, tally = read(path)
    assert [piece.document for piece in pieces] == [f"Good {i}" for i in range(9)]
    assert pieces[-1].text.endswith("More words. More")
    assert tally.counts == {
        "pages": 9,
        "pages with broken XML": 1,
    }
    in_parts, _ = read(path, 700)
    assert in_parts == pieces


def test_a_dump_without_its_site_is_parsed(tmp_path: Path) -> None:
    (tmp_path / "d.xml").write_text(f"<mediawiki>{page('One', 'The [[first]].')}</mediawiki>")
    pieces, tally = read(tmp_path / "d.xml")
    assert [piece.text for piece in pieces] == ["One\n\nThe first."]
    assert tally.counts == {"pages": 1}


def test_an_entity_bomb_is_refused(tmp_path: Path) -> None:
    entities = "".join(
        f'<!ENTITY lol{i} "{"&lol" + str(i - 1) + ";" if i else "lol"}">' * 1 for i in range(10)
    )
    bomb = f"<?xml version='1.0'?><!DOCTYPE mediawiki [{entities}]>" + HEAD + page("A", "x")
    (tmp_path / "d.xml").write_text(bomb + "</mediawiki>")
    with pytest.raises(DataError, match="defines DOCTYPE"):
        read(tmp_path / "d.xml")
    (tmp_path / "e.xml").write_text("no dump at all")
    with pytest.raises(DataError, match="no MediaWiki dump"):
        read(tmp_path / "e.xml")


def test_a_page_that_takes_too_long_is_stripped_by_simple_rules(tmp_path: Path) -> None:
    # Half a million open templates keep the parser busy for longer than it is given.
    slow = "Slow '''words'''. <nowiki/>" + "{{a|[[b|" * 60_000
    pages = (page("Fast", "Fast words."), page("Slow", slow), page("Last", "Last words."))
    pieces, tally = read(dump(tmp_path / "d.xml", *pages), page_seconds=0.2)
    assert [piece.document for piece in pieces] == ["Fast", "Slow", "Last"]
    assert pieces[1].text.startswith("Slow\n\nSlow words.")
    assert tally.counts["pages stripped by simple rules"] == 1
    assert "took too long" in tally.places[0]


def test_what_a_template_leaves_in_brackets_is_tidied() -> None:
    made = parse_wikitext(
        "ANSI ({{IPA|x}}, ANSI, {{IPAc-en|y}}) and f(a, b), ( {{x}} ) end", LEFT_OUT
    )
    assert made == "ANSI (ANSI) and f(a, b), end"
    made = parse_wikitext(
        "the vowel {{IPA|a}}, angle, <math>x</math>, and ( {{x}} al-J,b)", LEFT_OUT
    )
    assert made == "the vowel, angle, and (al-J,b)"
    assert parse_wikitext("[[OS&nbsp;X]] runs", LEFT_OUT) == "OS X runs"


def test_a_list_within_a_list_is_set_in() -> None:
    made = parse_wikitext("* a\n** b\n*** c\n* d\n# e\n## f", LEFT_OUT)
    assert made == "- a\n  - b\n    - c\n- d\n- e\n  - f"


@pytest.mark.data
def test_the_documentations_samples_are_what_is_made(test_data: Path) -> None:
    xml = bz2.decompress((test_data / "wikipedia" / "enwiki-shortened.xml.bz2").read_bytes())
    dump_text = html.unescape(xml.decode())
    page = (ROOT / "docs" / "wikipedia.md").read_text()
    cells = [
        html.unescape(cell.replace("<br>\n", "\n")).replace("\u00a0", " ")
        for cell in re.findall("<td>(.*?)</td>", page, re.DOTALL)
    ]
    assert len(cells) >= 10
    for markup, text in zip(cells[::2], cells[1::2], strict=True):
        assert markup in dump_text
        assert parse_wikitext(markup, LEFT_OUT) == text


def test_one_parser_serves_all_ranges_of_a_process(tmp_path: Path) -> None:
    path = dump(tmp_path / "d.xml", *(page(f"T{i}", f"words {i}") for i in range(30)))
    pieces, _ = read(path, size=500, page_seconds=31)
    first = wikipedia_module._cleaner(31.0)._process
    again, _ = read(path, size=2000, page_seconds=31)
    assert first is not None
    assert wikipedia_module._cleaner(31.0)._process is first
    assert (
        [p.text for p in pieces]
        == [p.text for p in again]
        == [f"T{i}\n\nwords {i}" for i in range(30)]
    )


def test_a_parser_that_dies_is_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    with PageCleaner(30) as cleaner:
        assert cleaner.clean("'''words'''", LEFT_OUT) == "words"
        assert cleaner._process is not None
        cleaner._process.kill()
        with pytest.raises(CleaningError, match="ended the parser"):
            cleaner.clean("lost", LEFT_OUT)
        assert cleaner.clean("again", LEFT_OUT) == "again"
    monkeypatch.setattr(page_cleaner_module, "_LARGEST_ANSWER", 10)
    with PageCleaner(30) as cleaner, pytest.raises((CleaningError, EOFError)):
        cleaner.clean("words " * 100, LEFT_OUT)


def test_wikiextractors_folders_are_read(tmp_path: Path) -> None:
    for name in ("AA", "AB"):
        (tmp_path / name).mkdir()
    (tmp_path / "AA" / "wiki_00").write_text(
        '<doc id="12" url="https://x" title="Anarchism">\nAnarchism\n\nA philosophy &amp; more.\n</doc>\n'
        '<doc id="13" url="https://x" title="A &amp; B">\nA & B\n\nLetters.\n\n</doc>\n'
    )
    (tmp_path / "AB" / "wiki_00").write_text(
        '<doc id="14" url="https://x" title="Last">\nLast\n\nText.\n</doc>\n<doc id="15" url="x" title="E">\nE\n\n</doc>'
    )
    pieces, _ = read(tmp_path)
    assert [piece.text.split("\n\n")[0] for piece in pieces] == ["Anarchism", "A & B", "Last"]
    assert pieces[1].text == "A & B\n\nLetters."


def test_a_dump_is_prepared_the_same_by_any_number_of_workers(tmp_path: Path) -> None:
    pages = [page(f"Title {i}", f"Some '''words''' of article {i}. " * 20) for i in range(60)]
    dump(tmp_path / "d.xml", *pages)
    (tmp_path / "d.xml.bz2").write_bytes(bz2.compress((tmp_path / "d.xml").read_bytes()))
    made = []
    for name, workers, shard_bytes in (("d.xml", 1, 1 << 24), ("d.xml.bz2", 2, 20_000)):
        out = tmp_path / f"{workers}"
        result = penstock.prepare(
            source={"kind": "wikipedia", "path": str(tmp_path / name)},
            tokenizer={"train": True, "vocab_size": 300},
            data={"path": str(out), "sequence_length": 16},
            prepare={"workers": workers, "shard_bytes": shard_bytes},
        )
        facts = result.dataset.manifest["splits"]
        assert sum(split["documents"] for split in facts.values()) == 60
        made.append([(out / f"{split}.bin").read_bytes() for split in ("train", "test")])
    assert made[0] == made[1]


def test_a_parser_that_does_not_start_costs_its_page_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with PageCleaner(30) as cleaner:
        with monkeypatch.context() as patch:
            patch.setattr(page_cleaner_module, "_PROGRAM", "raise SystemExit(3)")
            with pytest.raises(CleaningError, match="ended the parser"):
                cleaner.clean("lost", LEFT_OUT)
        assert cleaner.clean("again", LEFT_OUT) == "again"
