"""Contacts, calendars, subtitles, FictionBook, saved pages, Apple's mails and folders, pictures with text."""

import plistlib
from pathlib import Path

import pytest

from nectar_mlx import documents
from nectar_mlx.documents import ocr
from nectar_mlx.documents.formats import parse
from nectar_mlx.documents.reading import Unreadable
from tests.documents.makers import refusal, text_of, write
from tests.documents.test_epub import BOOK

CARD = """BEGIN:VCARD
VERSION:3.0
N:Lovelace;Ada;;;
FN:Ada Lovelace
item1.TEL;TYPE=CELL:+44 20 7946
ADR;TYPE=HOME:;;12 St James\\, Square;London;;SW1;
NOTE;ENCODING=QUOTED-PRINTABLE;CHARSET=UTF-8:Caf=C3=A9 and a very =
long note
PHOTO;ENCODING=b;TYPE=JPEG:AAAABBBBCCCC
 DDDDEEEE
BDAY:18151210
END:VCARD
BEGIN:VCARD
FN:Karl
END:VCARD
"""
CALENDAR = """BEGIN:VCALENDAR
PRODID:x
BEGIN:VEVENT
UID:1
DTSTART;TZID="Europe/Berlin":20240305T140000
SUMMARY:Dentist\\, upper floor
DESCRIPTION:Bring\\nthe card\\; and
  a coat
BEGIN:VALARM
END:VALARM
END:VEVENT
END:VCALENDAR
"""


def test_contacts() -> None:
    document = parse(CARD.encode(), "a.vcf")
    ada = "FN: Ada Lovelace\nTEL: +44 20 7946\nADR: 12 St James, Square, London, SW1\n"
    assert document.text == ada + "NOTE: Café and a very long note\nBDAY: 1815-12-10\n\nFN: Karl"
    assert [place.label() for place in document.places] == ["contact 1: Ada Lovelace", "contact 2: Karl"]


def test_an_entry_without_a_value_takes_linear_time() -> None:
    assert parse(f"BEGIN:VCARD\nFN:x\nTEL{';a=b' * 20_000}\nEND:VCARD".encode(), "a.vcf").text == "FN: x"


def test_calendars() -> None:
    document = parse(CALENDAR.replace("\n", "\r\n").encode(), "a.ics")
    lines = ["DTSTART: 2024-03-05 14:00", "SUMMARY: Dentist, upper floor", "DESCRIPTION: Bring the card; and a coat"]
    assert document.text == "\n".join(lines) and document.places[0].label() == "event 1: Dentist, upper floor"


def test_subtitles() -> None:
    srt = "1\n00:00:01,000 --> 00:00:04,000\n<i>Hello</i> there\n\n2\n00:01:00,5 --> 00:01:02,0\nHello there\n1984\n"
    document = parse(srt.encode(), "a.srt")
    assert document.text == "Hello there\n\n1984"
    assert [place.label() for place in document.places] == ["minute 0:00", "minute 0:01"]
    vtt = "WEBVTT\n\nNOTE a remark\n\n12:01.000 --> 12:03.000 align:start\n<v Ana>Yes.</v>\n"
    assert parse(vtt.encode(), "a.vtt").text == "Yes."


def test_fictionbook() -> None:
    book = """<?xml version="1.0" encoding="windows-1251"?><FictionBook xmlns:l="x"><description><title-info>
    <book-title>Книга</book-title></title-info></description><body><section><title><p>Глава</p><p>первая</p></title>
    <p>Снег<a l:href="#n1" type="note">1</a> шёл.</p><poem><stanza><v>стих</v></stanza></poem></section></body>
    <body name="notes"><section id="n1"><p>Белый.</p></section></body><binary>AAAA</binary></FictionBook>"""
    document = parse(book.encode("cp1251"), "a.fb2")
    assert document.text == "# Книга\n\n## Глава первая\n\nСнег[1] шёл.\n\nстих\n\nБелый."
    assert document.places[0].label() == "chapter 1: Глава первая"


def test_a_page_that_safari_saved() -> None:
    page = {
        "WebResourceData": "<nav>x</nav><p>größe</p>".encode("latin-1"),
        "WebResourceTextEncodingName": "iso-8859-1",
    }
    for form in (plistlib.FMT_BINARY, plistlib.FMT_XML):
        assert parse(plistlib.dumps({"WebMainResource": page}, fmt=form), "a.webarchive").text == "größe"


def test_a_mail_of_apples_mail() -> None:
    mail = b"Subject: Hello\nContent-Type: text/plain\n\nThe body.\n"
    data = b"%d      \n" % len(mail) + mail + b"<?xml version='1.0'?><plist><dict/></plist>"
    assert parse(data, "1.emlx").text == "# Hello\n\nSubject: Hello\n\nThe body."


def test_folders_that_are_one_file(tmp_path: Path) -> None:
    for name, content in BOOK.items():
        write(tmp_path / "book.epub" / name, content)
    write(tmp_path / "old.pages" / "index.xml", "<a/>")
    write(tmp_path / "page.html", "<p>The page.</p>")
    write(tmp_path / "page_files" / "code.js", "var x;")
    write(tmp_path / "note.rtfd" / "TXT.rtf", r"{\rtf1 A note.}")
    reading = documents.read([tmp_path])
    assert "fox" in reading.text and "The page." in reading.text and "A note." in reading.text
    assert {file.name: file.reason for file in reading.files if not file.was_read} == {
        "old.pages": "an Apple Pages file; export it as .docx",
        "page_files": "the pictures and scripts of a saved page",
    }
    assert "fox" in text_of(tmp_path / "book.epub") and "export it" in refusal(tmp_path / "old.pages")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.vcf", b"BEGIN:VCARD\nFN:x", "no contact"),
        ("a.ics", b"BEGIN:VCALENDAR\nEND:VCALENDAR", "no contact"),
        ("a.srt", b"1\n2\n3", "no subtitles"),
        ("a.fb2", b"<FictionBook/>", "no text"),
        ("a.fb2", b"<a>" * 9999, "deep"),
        ("a.webarchive", b"bplist00", "damaged"),
        ("a.webarchive", b"<?xml", "damaged"),
        ("a.webarchive", plistlib.dumps({"WebMainResource": 5}), "damaged"),
        ("a.webarchive", plistlib.dumps(["a"]), "damaged"),
        ("a.emlx", b"Subject: x\n\nbody", "does not start with its length"),
        ("a.mobi", b"BOOKMOBI", "Kindle"),
        ("a.msg", b"x", "Outlook"),
        ("a.doc", b"x", "save it as .docx"),
        ("a.nectar", b"x", "fitted already; `nectar ask` takes it"),
    ],
)
def test_what_is_wrong_is_said(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        parse(data, name)


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "letter.png", b"\x89PNG\r\n\x1a\n" + bytes(99))
    monkeypatch.setattr(ocr, "available", lambda: "")
    assert "no text recognition is installed" in refusal(path)
    monkeypatch.setattr(ocr, "available", lambda: "tesseract")
    monkeypatch.setattr(ocr, "_tesseract", lambda path: ["Dear Ana,", "come soon."] if path.suffix == ".png" else [])
    assert text_of(path) == "Dear Ana,\ncome soon."
    assert "no text was recognized" in refusal(write(tmp_path / "photo.jpg", b"\xff\xd8\xff"))
