"""A folder of 200 files of every kind, a tenth of them broken: all good ones are read, each broken one is named."""

import json
import plistlib
import time
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pypdf
import pytest

from nectar_mlx import documents
from tests.documents.makers import column, pdf, pdf_pages, write, zipped
from tests.documents.test_docx import docx, paragraph, table
from tests.documents.test_epub import BOOK
from tests.documents.test_office import odt, pptx, shape

COUNT = 200
WORDS = "The river runs through the old town and under the stone bridge, where the market stands on Fridays."
PICTURE_PAGE = b"q 500 0 0 700 40 60 cm /I Do Q"


def fact(number: int) -> str:
    return f"The code of room {number} is {4711 + number}."


def _pdf(path: Path, number: int) -> None:
    pages = [column([WORDS[:50], WORDS[50:], fact(number) if page == 2 else "Nothing here."]) for page in range(4)]
    write(path, pdf(*pages))


def _docx(path: Path, number: int) -> None:
    docx(path, paragraph(WORDS) * 50 + table((paragraph("k"), paragraph(fact(number)))))


def _epub(path: Path, number: int) -> None:
    write(path, zipped(BOOK | {"OEBPS/text/one.xhtml": f"<p>{WORDS}</p>" * 200 + f"<p>{fact(number)}</p>"}))


def _html(path: Path, number: int) -> None:
    write(path, "<nav>Home</nav>" + f"<p>{WORDS}</p>" * 100 + f"<p>{fact(number)}</p>")


def _xlsx(path: Path, number: int) -> None:
    workbook = openpyxl.Workbook()
    for row in range(100):
        workbook.worksheets[0].append([row, WORDS, row * 1.5])
    workbook.create_sheet("Facts").append(["fact", fact(number)])
    workbook.save(path)


def _notebook(path: Path, number: int) -> None:
    write(path, json.dumps({"cells": [{"cell_type": "markdown", "source": [WORDS, fact(number)]}]}))


def _mail(path: Path, number: int) -> None:
    write(path, f"Subject: Mail {number}\nFrom: a@x.org\nContent-Type: text/plain; charset=utf-8\n\n{fact(number)}\n")


def _mbox(path: Path, number: int) -> None:
    write(path, f"From a@x.org Mon Jan  1 00:00:00 2024\nSubject: x\n\n{fact(number)}\n\n" * 20)


def _webarchive(path: Path, number: int) -> None:
    page = {"WebResourceData": f"<p>{fact(number)}</p>".encode(), "WebResourceMIMEType": "text/html"}
    write(path, plistlib.dumps({"WebMainResource": page}, fmt=plistlib.FMT_BINARY))


GOOD: dict[str, Callable[[Path, int], object]] = {
    "txt": lambda path, n: write(path, f"{WORDS}\n" * 300 + fact(n)),
    "md": lambda path, n: write(path, f"# Notes\n\n{WORDS}\n\n{fact(n)}"),
    "csv": lambda path, n: write(path, f"name,fact\nx,{fact(n)}\n"),
    "json": lambda path, n: write(path, json.dumps({"fact": fact(n)})),
    "yaml": lambda path, n: write(path, f"fact: {fact(n)}\n"),
    "log": lambda path, n: write(path, f"12:00 {fact(n)}\n" * 100),
    "py": lambda path, n: write(path, f"# {fact(n)}\nx = 1\n"),
    "rtf": lambda path, n: write(path, rf"{{\rtf1\ansi {WORDS}\par {fact(n)}}}"),
    "odt": lambda path, n: odt(path, f"<text:p>{WORDS}</text:p>" * 50 + f"<text:p>{fact(n)}</text:p>"),
    "pptx": lambda path, n: pptx(path, shape("Title", "title"), shape(fact(n))),
    "pdf": _pdf,
    "docx": _docx,
    "epub": _epub,
    "html": _html,
    "xlsx": _xlsx,
    "ipynb": _notebook,
    "eml": _mail,
    "mbox": _mbox,
    "vcf": lambda path, n: write(path, f"BEGIN:VCARD\nFN:Ana\nNOTE:{fact(n)}\nPHOTO;ENCODING=b:AAAA\nEND:VCARD\n"),
    "ics": lambda path, n: write(path, f"BEGIN:VCALENDAR\nBEGIN:VEVENT\nSUMMARY:{fact(n)}\nEND:VEVENT\nEND:VCALENDAR"),
    "srt": lambda path, n: write(path, f"1\n00:00:01,000 --> 00:00:02,000\n{fact(n)}\n"),
    "fb2": lambda path, n: write(path, f"<FictionBook><body><section><p>{fact(n)}</p></section></body></FictionBook>"),
    "webarchive": _webarchive,
}  # fmt: skip


def _locked(path: Path) -> None:
    writer = pypdf.PdfWriter(clone_from=write(path, pdf(column([WORDS]))))
    writer.encrypt("secret", algorithm="AES-256")
    writer.write(path)


BROKEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "cut.pdf": ("damaged", lambda path: write(path, pdf(column([WORDS]))[:40])),
    "locked.pdf": ("encrypted", _locked),
    "scan.pdf": ("only pictures", lambda path: write(path, pdf_pages([PICTURE_PAGE]))),
    "cut.docx": ("not a whole DOCX", lambda path: write(path, zipped({"word/document.xml": WORDS * 9})[:90])),
    "deep.docx": ("deep", lambda path: write(path, zipped({"word/document.xml": "<a>" * 9999}))),
    "empty.txt": ("empty", lambda path: write(path, "")),
    "noise.txt": ("not a text", lambda path: write(path, bytes(range(256)) * 9)),
    "old.doc": ("old Word", lambda path: write(path, b"\xd0\xcf\x11\xe0" + bytes(600))),
    "picture.png": ("a picture", lambda path: write(path, b"\x89PNG\r\n\x1a\n" + bytes(99))),
    "bad.ipynb": ("not JSON", lambda path: write(path, "{")),
    "bad.epub": ("has no", lambda path: write(path, zipped({"mimetype": "application/epub+zip"}))),
    "bad.xlsx": ("no workbook", lambda path: write(path, zipped({"x.xml": "<a/>"}))),
    "bad.eml": ("not a mail", lambda path: write(path, "\n\nno headers")),
    "blank.html": ("no text", lambda path: write(path, "<html><body></body></html>")),
    "bad.vcf": ("no contact", lambda path: write(path, "BEGIN:NOTHING")),
    "bad.fb2": ("damaged", lambda path: write(path, "<FictionBook><body>")),
    "bad.webarchive": ("damaged", lambda path: write(path, b"bplist00" + bytes(40))),
    "strange": ("not known", lambda path: write(path, bytes(range(255, -1, -1)) * 9)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 good files and 20 broken ones, some kinds twice."""
    root = tmp_path_factory.mktemp("mixed")
    kinds = list(GOOD)
    for number in range(COUNT - COUNT // 10):
        kind = kinds[number % len(kinds)]
        (root / f"folder {number % 7}").mkdir(exist_ok=True)
        GOOD[kind](root / f"folder {number % 7}" / f"good {number}.{kind}", number)
    for number in range(COUNT // 10):
        name = list(BROKEN)[number % len(BROKEN)]
        BROKEN[name][1](root / f"{number} {name}")
    return root


def test_good_ones_are_read_and_broken_ones_named(folder: Path) -> None:
    start = time.perf_counter()
    reading = documents.read([folder])
    seconds = time.perf_counter() - start
    good = [report for report in reading.files if "good" in report.name]
    broken = [report for report in reading.files if "good" not in report.name]
    assert (len(good), len(broken)) == (180, 20)
    for report in good:
        number = int(report.name.split("good ")[1].partition(".")[0])
        assert report.was_read, report.describe()
        assert fact(number) in reading.text[report.start : report.end], report.describe()
    for report in broken:
        reason, _ = BROKEN[report.name.split(" ", 1)[1]]
        assert reason in report.reason, report.describe()
    assert reading.summary().startswith("read 180 of 200 files: ")
    print(f"{seconds / COUNT * 1000:.1f} ms a file")
    assert seconds < 0.1 * COUNT


def test_the_page_of_a_fact_is_known(folder: Path) -> None:
    reading = documents.read([folder], include=["*.pdf"])
    for report in (report for report in reading.files if report.was_read):
        number = int(report.name.split("good ")[1].partition(".")[0])
        found = reading.place(reading.text.index(fact(number)))
        assert found is not None and found[1] is not None
        assert (found[0].name, found[1].unit, found[1].name) == (report.name, "page", "3")
