"""Inputs that programs really write, or that a person with bad intentions could: each read right, in bounded time."""

import time
from collections.abc import Mapping

import pytest

from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.formats import parse
from nectar_mlx.documents.html import html_text
from tests.documents.makers import zipped
from tests.documents.test_docx import TRANSITIONAL, paragraph, run, table
from tests.documents.test_epub import BOOK, PACKAGE


def word(body: str) -> str:
    document = f'<w:document xmlns:w="{TRANSITIONAL}"><w:body>{body}</w:body></w:document>'
    return parse(zipped({"word/document.xml": document}), "a.docx").text


def book(changes: Mapping[str, str | bytes | None]) -> str:
    members = {name: content for name, content in (BOOK | dict(changes)).items() if content is not None}
    return parse(zipped(members), "a.epub").text


RAISED, LOWERED = '<w:vertAlign w:val="superscript"/>', '<w:vertAlign w:val="subscript"/>'
FIELD = "<w:sdt><w:sdtContent>%s</w:sdtContent></w:sdt>"
MERGED = "<w:tc><w:tcPr><w:vMerge%s/></w:tcPr>%s</w:tc><w:tc>%s</w:tc>"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (f"<w:p>{run('Form ')}{FIELD % run('field')}</w:p>", "Form field"),
        (f"<w:p><w:smartTag>{run('Paris')}</w:smartTag>{run(' is')}</w:p>", "Paris is"),
        (f'<w:p><w:fldSimple w:instr="REF x">{run("Table 3")}</w:fldSimple></w:p>', "Table 3"),
        (f"<w:p>{run('m')}{run('2', RAISED)}{run(' area')}</w:p>", "m^2 area"),
        (f"<w:p>{run('CO')}{run('2', LOWERED)}</w:p>", "CO2"),
        (paragraph("Kran\u00adken\u00adhaus"), "Kran\u00adken\u00adhaus"),
        (
            "<w:tbl><w:tr>{}</w:tr><w:tr>{}</w:tr></w:tbl>".format(
                MERGED % (' w:val="restart"', paragraph("big"), paragraph("1")),
                MERGED % ("", paragraph(""), paragraph("2")),
            ),
            "big | 1\n | 2",
        ),
        (table((paragraph("a") + paragraph("b"), paragraph("c"))), "a b | c"),
    ],
)
def test_word(body: str, text: str) -> None:
    assert word(body) == text


ONE = "OEBPS/text/one.xhtml"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({ONE: "<html><head><title/></head><body><p>10&nbsp;km &mdash; far</p></body></html>"}, "10\u00a0km — far"),
        ({ONE: '<html><body><p><a id="p1"/>Then <span/>came</p><div/><p>more'}, "Then came\n\nmore"),
        ({ONE: '<p>main<sup><a href="#n">1</a></sup></p><aside id="n">a note</aside>'}, "main[1]\n\na note"),
        ({ONE: '<p>10<sup>6</sup> <a href="x">of</a> them</p>'}, "10^6 of them"),
        ({ONE: '<?xml version="1.0" encoding="windows-1251"?><p>Привет</p>'.encode("cp1251")}, "Привет"),
        ({ONE: '<?xml version="1.0" encoding="iso-8859-1"?><p>naïve</p>'.encode()}, "naïve"),
        ({"OEBPS/book.opf": PACKAGE.replace("text/one.xhtml", "text\\one.xhtml")}, "## One\n\nfox"),
        ({"OEBPS/book.opf": PACKAGE.replace("text/one.xhtml", "text/one.xhtml?x=1#a")}, "## One\n\nfox"),
        ({"OEBPS/book.opf": PACKAGE.replace("text/one.xhtml", "../OEBPS/text/one.xhtml")}, "## One\n\nfox"),
        (
            {
                "OEBPS/book.opf": PACKAGE.replace("one.xhtml", "%C3%A9.xhtml"),
                ONE: None,
                "OEBPS/text/e\u0301.xhtml": "<p>accent</p>",
            },
            "accent",
        ),
        *(
            ({"OEBPS/book.opf": PACKAGE.replace('<item id="one"', f'<item media-type="{kind}" id="one"')}, "fox")
            for kind in ("application/xhtml+xml; charset=utf-8", "Text/HTML", "text/xml")
        ),
    ],
)
def test_books(changes: dict[str, str | bytes | None], text: str) -> None:
    assert text in book(changes)


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ('<p class="x>one</p><p>two</p>', "one\n\ntwo"),
        ('<p title="a > b">one</p>', "one"),
        ('<p data-x="<b>x</b>" id=y>one</p>', "one"),
        ('<p data-x="a>b">one</p><p class="y">two', "one\n\ntwo"),
        ("<p>one</p><title/><p>two</p>", "one\n\ntwo"),
        ("<p>one</p><textarea/><p>two</p>", "one\n\ntwo"),
        ("<p>one</p><button/><p>two</p>", "one\n\ntwo"),
        ("<noscript><p>only here</p></noscript>", "only here"),
        ("<p>seen</p><noscript><p>not here</p></noscript>", "seen"),
        ('<div class="recipe cookies-and-cream"><p>Bake them</p></div>', "Bake them"),
        ('<article class="post cookie-recipe"><p>Bake them</p></article>', "Bake them"),
        ('<div class="cookie">We use cookies</div><p>text</p>', "text"),
        ('<div id="cookieConsent">We use cookies</div><p>text</p>', "text"),
        ("Street 5<br>Town", "Street 5\nTown"),
        ("<p>one</p><!--> <p>two</p>", "one\n\ntwo"),
        ("<p>H<sub>2</sub>O, 10<sup>-3</sup>, 1<sup>st</sup></p>", "H2O, 10^-3, 1st"),
    ],
)
def test_pages(html: str, text: str) -> None:
    assert html_text(html)[0] == text


@pytest.mark.parametrize(
    "html",
    [
        "<b>" * 60_000 + "x",
        "<" * 200_000 + "x",
        "&" * 200_000 + "x",
        '<p a="' * 30_000 + "x",
        "<p a='>" * 30_000 + "x",
        "<p>" + "".join(f"<font size={n}>" for n in range(3000)) + "<p>y" * 3000 + "x",
        "<table><tr><td>" * 3000 + "x",
        "<sup><a>" * 20_000 + "x",
    ],
    ids=lambda html: html[:8],
)
def test_pages_take_linear_time(html: str) -> None:
    start = time.process_time()
    assert "x" in html_text(html)[0] + "x"
    assert time.process_time() - start < 3


RUSSIAN, CHINESE = "Привет, мир! Это обычный текст. " * 4, "今天天气很好，我们去公园散步。\n" * 9
HEBREW = "שלום עולם, זהו טקסט רגיל בעברית עם כמה מילים נוספות."


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (RUSSIAN.encode("utf-16-le"), RUSSIAN),
        (RUSSIAN.encode("utf-16-be"), RUSSIAN),
        (CHINESE.encode("utf-16-le"), CHINESE),
        ("今日は天気が良いので".encode("iso2022_jp"), "今日は天気が良いので"),
        (HEBREW.encode("cp1255"), HEBREW),
        (b"\xef\xbb\xbf\xef\xbb\xbfone\n\xef\xbb\xbftwo", "one\ntwo"),
        (b"\x1b[1;31merror\x1b[0m: disk full", "error: disk full"),
        (b"12:00 start\n" + bytes(4096) + b"12:05 restart\n", "12:00 start\n12:05 restart\n"),
    ],
)
def test_texts(data: bytes, text: str) -> None:
    assert decode(data) == (text, [])
