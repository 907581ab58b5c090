"""E-books: every chapter in its order and in its encoding, and books that are not whole."""

import os
import sys
from pathlib import Path

import pytest

from nectar_mlx.documents import archive
from tests.documents.makers import refusal, report_of, text_of, write, zipped

CONTAINER = """<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0">
<rootfiles><rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
PACKAGE = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>A Book</dc:title></metadata>
<manifest><item id="two" href="text/two%20b.xhtml"/><item id="one" href="text/one.xhtml"/>
<item id="css" href="a.css"/></manifest>
<spine><itemref idref="one"/><itemref idref="two"/></spine></package>"""
BOOK: dict[str, str | bytes] = {
    "META-INF/container.xml": CONTAINER,
    "OEBPS/book.opf": PACKAGE,
    "OEBPS/text/two b.xhtml": "<html><head><title>x</title></head><body><h2>Two</h2><p>dög</p></body></html>",
    "OEBPS/text/one.xhtml": "<html><body><h2>One</h2><p>fox</p><script/></body></html>",
}
BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


def book(path: Path, changes: dict[str, str | bytes | None]) -> Path:
    members = {name: content for name, content in (BOOK | changes).items() if content is not None}
    return write(path, zipped(members))


def one_chapter(path: Path, content: str | bytes) -> Path:
    return book(path, {"OEBPS/text/one.xhtml": content, "OEBPS/text/two b.xhtml": "<p>.</p>"})


def unpacked(path: Path) -> Path:
    """The book as Books keeps it."""
    for name, content in BOOK.items():
        write(path / name, content)
    return path


def test_a_folder_with_times_and_names_that_no_zip_file_has(tmp_path: Path) -> None:
    for file in unpacked(tmp_path / "a.epub").rglob("*"):
        os.utime(file, (0, 0))
    if sys.platform == "linux":  # elsewhere names are text
        (tmp_path / "a.epub" / "cover\udcff.jpg").write_bytes(b"no text")
    assert "fox" in text_of(tmp_path / "a.epub")


def test_a_folder_holds_no_more_than_a_zip_file_could(tmp_path: Path) -> None:
    """Links lead to its own files alone; what else no file has in it is left aside."""
    secret = write(tmp_path / "secret.xhtml", "<p>secret</p>")
    text = unpacked(tmp_path / "a.epub") / "OEBPS" / "text"
    (text / "one.xhtml").rename(text / "moved.xhtml")
    (text / "one.xhtml").symlink_to("moved.xhtml")
    (text / "two b.xhtml").unlink()
    (text / "two b.xhtml").symlink_to(secret)
    (text / "up").symlink_to(tmp_path)
    (text / "loop").symlink_to("loop")
    os.mkfifo(text / "pipe.xhtml")
    assert text_of(tmp_path / "a.epub") == "# A Book\n\n## One\n\nfox"
    assert report_of(tmp_path / "a.epub").left_out == ["chapter text/two%20b.xhtml: the book does not hold it"]


def test_a_folder_that_is_no_book_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.epub" / "notes.txt", "fox")
    assert refusal(tmp_path / "a.epub").startswith(f"{tmp_path / 'a.epub'}: no EPUB file: it has no META-INF")


def test_chapters_in_reading_order(tmp_path: Path) -> None:
    path = book(tmp_path / "a.epub", {})
    assert text_of(path) == "# A Book\n\n## One\n\nfox\n\n## Two\n\ndög"
    report, text = report_of(path), text_of(path)
    assert [(place.unit, place.name, text[place.start : place.end]) for place in report.places] == [
        ("chapter", "1 One", "## One\n\nfox"),
        ("chapter", "2 Two", "## Two\n\ndög"),
    ]


@pytest.mark.parametrize(
    "href", ["text/one.xhtml#start", "text/ONE.xhtml", "text/./one.xhtml", "/OEBPS/text/one.xhtml"]
)
def test_a_chapter_is_found(href: str, tmp_path: Path) -> None:
    path = book(tmp_path / "a.epub", {"OEBPS/book.opf": PACKAGE.replace("text/one.xhtml", href)})
    assert "fox" in text_of(path) and report_of(path).left_out == []


def test_a_chapter_of_several_parts_is_read_once(tmp_path: Path) -> None:
    package = PACKAGE.replace("text/two%20b.xhtml", "text/one.xhtml#second")
    assert text_of(book(tmp_path / "a.epub", {"OEBPS/book.opf": package})).count("fox") == 1


def test_a_missing_chapter_is_named(tmp_path: Path) -> None:
    path = book(tmp_path / "a.epub", {"OEBPS/text/one.xhtml": None})
    assert report_of(path).left_out == ["chapter text/one.xhtml: the book does not hold it"]
    package = PACKAGE.replace('<itemref idref="one"/>', '<itemref idref="absent"/>')
    path = book(tmp_path / "b.epub", {"OEBPS/book.opf": package})
    assert report_of(path).left_out == ["chapter absent: the book does not list it"]


@pytest.mark.parametrize("encoding", ["iso-8859-1", "utf-16", "utf-8", "windows-1251"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    text = "Привет" if encoding == "windows-1251" else "Café Müller, 12 £"
    html = f'<?xml version="1.0" encoding="{encoding}"?><html><body><p>{text}</p></body></html>'
    assert text in text_of(one_chapter(tmp_path / "a.epub", html.encode(encoding)))


def test_soft_hyphens_and_formulas(tmp_path: Path) -> None:
    html = "<p>Do&#173;nau&#173;schiff <math><mi>E</mi><mo>=</mo><msup><mi>c</mi><mn>2</mn></msup></math></p>"
    assert "Donauschiff E=c^2" in text_of(one_chapter(tmp_path / "a.epub", html))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"META-INF/container.xml": None}, "has no META-INF/container.xml"),
        ({"OEBPS/book.opf": None}, "has no contents"),
        ({"OEBPS/book.opf": "<package"}, "damaged"),
        ({"OEBPS/book.opf": BOMB + PACKAGE}, "entities"),
        ({"OEBPS/book.opf": BOMB + "<package>&b;</package>"}, "entities"),
        ({"META-INF/container.xml": "<container/>"}, "has no contents"),
        ({"OEBPS/text/one.xhtml": None, "OEBPS/text/two b.xhtml": "<html/>"}, "no text"),
        ({"META-INF/encryption.xml": '<CipherReference URI="OEBPS/text/one.xhtml"/>'}, "DRM"),
        ({"META-INF/container.xml": "<a>" * 100_000}, "nested more than 200 deep"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, str | bytes | None], reason: str, tmp_path: Path) -> None:
    message = refusal(book(tmp_path / "a.epub", change))
    assert "a.epub" in message and reason in message


def test_encrypted_fonts_do_no_harm(tmp_path: Path) -> None:
    fonts: dict[str, str | bytes | None] = {"META-INF/encryption.xml": '<CipherReference URI="OEBPS/font.otf"/>'}
    assert "fox" in text_of(book(tmp_path / "a.epub", fonts))


def test_a_zip_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 1 << 20)
    path = one_chapter(tmp_path / "a.epub", "a" * (1 << 22))
    assert path.stat().st_size < 20_000
    assert "unpacks to more than 1 MB" in refusal(path)


def test_cut_and_damaged_files(tmp_path: Path) -> None:
    whole = book(tmp_path / "a.epub", {}).read_bytes()
    for size in (1, 30, len(whole) // 2, len(whole) - 5):
        assert "EPUB" in refusal(write(tmp_path / "cut.epub", whole[:size]))
    damaged = whole[:60] + b"\xff" * 40 + whole[100:]
    assert "damaged" in refusal(write(tmp_path / "bad.epub", damaged))


@pytest.mark.parametrize("method", [9, 12, 14, 93, 97])
def test_other_ways_of_compressing_are_refused_in_a_line(method: int, tmp_path: Path) -> None:
    data = bytearray(book(tmp_path / "a.epub", {}).read_bytes())
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        start = data.find(mark)
        while start >= 0:
            data[start + offset] = method
            start = data.find(mark, start + 1)
    assert "EPUB" in refusal(write(tmp_path / "b.epub", bytes(data)))


CONTENTS = {
    "nav.xhtml": '<!DOCTYPE html><html><body><nav><a href="text/one.xhtml#a">The &amp; Storm</a></nav></body></html>',
    "toc.ncx": "<ncx><navMap><navPoint><navLabel><text>The &amp; Storm</text></navLabel>"
    '<content src="text/one.xhtml"/></navPoint></navMap></ncx>',
}


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("nav.xhtml", '<item id="n" href="nav.xhtml" properties="nav"/>'),
        ("toc.ncx", '<item id="n" href="toc.ncx" media-type="application/x-dtbncx+xml"/>'),
    ],
)
def test_chapters_without_a_heading_have_the_title_of_the_contents(name: str, item: str, tmp_path: Path) -> None:
    package = PACKAGE.replace("</manifest>", f"{item}</manifest>")
    changes: dict[str, str | bytes | None] = {
        "OEBPS/book.opf": package,
        f"OEBPS/{name}": CONTENTS[name],
        "OEBPS/text/one.xhtml": "<p>rain</p>",
    }
    assert [p.name for p in report_of(book(tmp_path / "a.epub", changes)).places] == ["1 The & Storm", "2 Two"]
    changes["OEBPS/book.opf"] = package.partition("<spine>")[0] + "<spine/></package>"
    assert text_of(book(tmp_path / "b.epub", changes)).endswith("rain")
    changes["OEBPS/" + name] = "<"
    changes["OEBPS/book.opf"] = package
    assert [p.name for p in report_of(book(tmp_path / "c.epub", changes)).places] == ["1", "2 Two"]


def test_the_sign_of_a_note_is_no_part_of_the_word(tmp_path: Path) -> None:
    page = '<p>Fact<a epub:type="noteref" href="#n">1</a> stands</p><p>and<a role="doc-noteref" href="#m">2</a>.</p>'
    assert "Fact[1] stands\n\nand[2]." in text_of(one_chapter(tmp_path / "a.epub", page))


def test_the_container_may_be_written_in_other_case(tmp_path: Path) -> None:
    changes: dict[str, str | bytes | None] = {"META-INF/container.xml": None, "meta-inf/CONTAINER.xml": CONTAINER}
    assert "fox" in text_of(book(tmp_path / "a.epub", changes))
