"""Documents of every kind, built here byte by byte, and everything that can be wrong with one."""

import io
import sys
import zipfile
from pathlib import Path

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nectar_mlx import NectarError, documents
from nectar_mlx.documents import markup

FOX = "The quick brown fox jumps over the lazy dog."


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def archive(path: Path, members: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def refusal(*paths: str | Path) -> str:
    with pytest.raises(NectarError) as error:
        documents.read(paths)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestText:
    def test_is_kept(self, tmp_path: Path) -> None:
        text = "# Title\n\n- a\n- b\n\n| x | y |\n\n    code"
        assert documents.read([write(tmp_path / "a.md", text)]) == text

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
    def test_encodings(self, encoding: str, tmp_path: Path) -> None:
        text = "Le garçon élève où l'été naît — «déjà vu», cœur, naïve façade.\n" * 5
        assert documents.read([write(tmp_path / "a.txt", text.encode(encoding))]) == text.strip()

    @pytest.mark.parametrize(
        ("text", "encoding"),
        [
            ("Привет, мир! Это обычный русский текст, написанный давно. " * 4, "cp1251"),
            ("これは日本語の文章です。古い文字コードで保存されています。" * 4, "shift_jis"),
            ("café", "cp1252"),
        ],
    )
    def test_legacy_encodings(self, text: str, encoding: str) -> None:
        assert documents.decode(text.encode(encoding)) == text

    @pytest.mark.parametrize("bom", [b"\xff\xfe", b"\xfe\xff"])
    def test_byte_order(self, bom: bytes) -> None:
        encoding = "utf-16-le" if bom == b"\xff\xfe" else "utf-16-be"
        assert documents.decode(bom + "é1".encode(encoding)) == "é1"

    def test_newlines(self) -> None:
        assert documents.decode(b"a\r\nb\rc\nd\x0ce") == "a\nb\nc\nd\ne"

    def test_an_unknown_suffix_may_be_text(self, tmp_path: Path) -> None:
        assert documents.read([write(tmp_path / "notes.log", FOX)]) == FOX
        assert documents.read([write(tmp_path / "README", FOX)]) == FOX

    def test_standard_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("naïve".encode())))
        assert documents.read(["-"]) == "naïve"
        assert "standard input: the file is empty" in refusal("-")

    @pytest.mark.parametrize(
        "data", [b"\x7fELF\x02\x01\x01" + bytes(200), b"\x89PNG\r\n\x1a\n\x00\x00", bytes(range(256)) * 4]
    )
    @pytest.mark.parametrize("name", ["a.txt", "a.bin", "a"])
    def test_binary_data_is_no_text(self, name: str, data: bytes, tmp_path: Path) -> None:
        assert "not a text file" in refusal(write(tmp_path / name, data))

    @pytest.mark.parametrize("data", [b"\xff\xfea", b"\xef\xbb\xbf\xff", b"\xff\xfe\x00\xd8"])
    def test_a_mark_that_lies(self, data: bytes, tmp_path: Path) -> None:
        assert "not a text file" in refusal(write(tmp_path / "a.txt", data))

    def test_rtf_is_told_apart(self, tmp_path: Path) -> None:
        assert "textutil" in refusal(write(tmp_path / "a.rtf", "{\\rtf1\\ansi Hello}"))

    @pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff"])
    @pytest.mark.parametrize("suffix", ["txt", "html"])
    def test_nothing_in_it(self, suffix: str, content: str, tmp_path: Path) -> None:
        assert "empty" in (said := refusal(write(tmp_path / f"a.{suffix}", content))) or "no text" in said

    @given(st.binary(max_size=300))
    @settings(max_examples=300, deadline=None)
    def test_any_bytes_are_text_or_refused(self, data: bytes) -> None:
        try:
            assert isinstance(documents.decode(data), str)
        except markup.Unreadable as error:
            assert "\n" not in str(error)


class TestSeveral:
    def test_are_headed_by_their_names(self, tmp_path: Path) -> None:
        one, two = write(tmp_path / "b.txt", "bee"), write(tmp_path / "a.txt", "ay")
        assert documents.read([one, str(two)]) == "# b.txt\n\nbee\n\n# a.txt\n\nay"

    def test_a_folder_is_read_in_order(self, tmp_path: Path) -> None:
        for name in ("z.txt", "a/2.md", "a/1.html", ".git/x.txt", "picture.png", "a/.hidden.txt"):
            write(tmp_path / name, name)
        text = documents.read([tmp_path])
        assert text == "# a/1.html\n\na/1.html\n\n# a/2.md\n\na/2.md\n\n# z.txt\n\nz.txt"

    def test_a_folder_below_a_hidden_one(self, tmp_path: Path) -> None:
        write(tmp_path / ".notes" / "a.txt", FOX)
        assert documents.read([tmp_path / ".notes"]) == FOX

    def test_a_folder_without_documents(self, tmp_path: Path) -> None:
        write(tmp_path / "picture.png", "x")
        assert "holds no document" in refusal(tmp_path)

    def test_one_bad_file_is_named(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", FOX)
        write(tmp_path / "b.pdf", "no pdf")
        assert "b.pdf" in refusal(tmp_path)

    def test_nothing_given(self) -> None:
        assert refusal() == "no document was given"

    def test_no_such_file(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "absent.txt") == f"{tmp_path / 'absent.txt'}: no such file or folder"


class TestHTML:
    @pytest.mark.parametrize(
        ("html", "text"),
        [
            ("<p>One\n  two</p><p>three<br>four</p>", "One two\n\nthree\nfour"),
            ("a &amp; b &lt;c&gt; &eacute;&nbsp;d &#8212; e", "a & b <c> é\u00a0d — e"),
            ("<h1>A <em>b</em></h1>text<h3>c</h3>", "# A b\n\ntext\n\n### c"),
            ("<ul><li>a</li><li><p>b</p></li></ul>after", "- a\n- b\n\nafter"),
            ("<ol><li>a<ol><li>x<li>y</ol><li>b</ol>", "1. a\n  1. x\n  2. y\n2. b"),
            ("<table><tr><th>k<th>v<tr><td>1<td></td><td>a<br>b</td></tr></table>z", "k | v\n1 |  | a b\n\nz"),
            ("<pre>\n  x = 1\n    y\n</pre>after  all", "  x = 1\n    y\n\nafter all"),
            ("<script>if (a<b) x()</script><style>p{}</style><title>t</title>seen<template><p>x</template>", "seen"),
            ("<div>a<div>b</div>c</div>", "a\n\nb\n\nc"),
            ("<p>unclosed <b>bold", "unclosed bold"),
            ("a<!-- hidden -->b<?php x ?>", "ab"),
            ("wo<b>rd</b>s and <i>more</i> words", "words and more words"),
            ("</ul></li></table><li>stray", "- stray"),
            ("<noscript><p>no</noscript>yes", "yes"),
            ("<p>1.</p><p>-</p>", "1.\n\n-"),
        ],
    )
    def test_text(self, html: str, text: str) -> None:
        assert markup.html_text(html) == text

    def test_declared_encoding(self, tmp_path: Path) -> None:
        page = '<html><meta charset="koi8-r"><p>Привет</p></html>'
        assert documents.read([write(tmp_path / "a.html", page.encode("koi8-r"))]) == "Привет"
        page = '<meta http-equiv="Content-Type" content="text/html; charset=no-such-encoding"><p>café</p>'
        assert documents.read([write(tmp_path / "b.htm", page.encode("cp1252"))]) == "café"

    @given(st.text(alphabet="<>/abulipretdh1 &;\n'\"=!-", max_size=80))
    @settings(max_examples=300, deadline=None)
    def test_any_page_can_be_read(self, html: str) -> None:
        markup.html_text(html)


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


class TestEPUB:
    def test_chapters_in_reading_order(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "a.epub", BOOK)
        assert documents.read([path]) == "# A Book\n\n## One\n\nfox\n\n## Two\n\ndög"

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"META-INF/container.xml": None}, "has no META-INF/container.xml"),
            ({"OEBPS/book.opf": None}, "has no OEBPS/book.opf"),
            ({"OEBPS/book.opf": "<package"}, "damaged"),
            ({"OEBPS/book.opf": BOMB + PACKAGE}, "damaged|entities"),
            ({"META-INF/container.xml": "<container/>"}, "has no contents"),
            ({"OEBPS/text/one.xhtml": None, "OEBPS/text/two b.xhtml": "<html/>"}, "no text"),
            ({"META-INF/encryption.xml": '<CipherReference URI="OEBPS/text/one.xhtml"/>'}, "DRM"),
        ],
    )
    def test_what_is_wrong_is_said(self, change: dict[str, str | None], said: str, tmp_path: Path) -> None:
        members = {name: content for name, content in (BOOK | change).items() if content is not None}
        message = refusal(archive(tmp_path / "a.epub", members))
        assert "a.epub" in message and any(part in message for part in said.split("|"))

    def test_encrypted_fonts_do_no_harm(self, tmp_path: Path) -> None:
        fonts = {"META-INF/encryption.xml": '<CipherReference URI="OEBPS/font.otf"/>'}
        assert "fox" in documents.read([archive(tmp_path / "a.epub", BOOK | fonts)])

    def test_a_zip_bomb_is_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(markup, "MAX_BYTES", 1 << 20)
        bomb = {"OEBPS/text/one.xhtml": "a" * (1 << 22)}
        path = archive(tmp_path / "a.epub", BOOK | bomb)
        assert path.stat().st_size < 20_000
        assert "unpacks to more than 1 MiB" in refusal(path)

    def test_cut_files(self, tmp_path: Path) -> None:
        whole = archive(tmp_path / "a.epub", BOOK).read_bytes()
        for size in (1, 30, len(whole) // 2, len(whole) - 5):
            assert "EPUB" in refusal(write(tmp_path / "cut.epub", whole[:size]))
        damaged = whole[:60] + b"\xff" * 40 + whole[100:]
        assert "damaged" in refusal(write(tmp_path / "bad.epub", damaged))


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
STYLES = f"""<w:styles {W}><w:style w:styleId="berschrift2"><w:name w:val="heading 2"/></w:style>
<w:style w:styleId="Titel"><w:name w:val="Title"/></w:style></w:styles>"""


def paragraph(text: str, properties: str = "") -> str:
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"


def docx(path: Path, body: str, **others: str) -> Path:
    members = {"word/document.xml": f"<w:document {W}><w:body>{body}</w:body></w:document>", "word/styles.xml": STYLES}
    return archive(path, members | {f"word/{name}.xml": content for name, content in others.items()})


class TestDOCX:
    def test_paragraphs_headings_lists_and_tables(self, tmp_path: Path) -> None:
        item = '<w:numPr><w:ilvl w:val="%d"/><w:numId w:val="1"/></w:numPr>'
        cell = "<w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p></w:tc>"
        body = (
            paragraph("Report", '<w:pStyle w:val="Titel"/>')
            + paragraph("Kapitel", '<w:pStyle w:val="berschrift2"/>')
            + '<w:p><w:r><w:t xml:space="preserve">One </w:t></w:r>'
            + "<w:r><w:t>two</w:t><w:tab/><w:t>three</w:t></w:r></w:p>"
            + paragraph("")
            + paragraph("a", item % 0)
            + paragraph("b", item % 1)
            + f"<w:tbl><w:tr>{cell.format('k')}{cell.format('v')}</w:tr>"
            + f"<w:tr>{cell.format('1')}{cell.format('')}</w:tr></w:tbl>"
            + paragraph("end")
        )
        text = "# Report\n\n## Kapitel\n\nOne two\tthree\n\n- a\n  - b\nk | v\n1 | \n\nend"
        assert documents.read([docx(tmp_path / "a.docx", body)]) == text

    def test_changes_count_as_accepted(self, tmp_path: Path) -> None:
        body = (
            "<w:p><w:ins><w:r><w:t>new</w:t></w:r></w:ins><w:del><w:r><w:delText>old</w:delText></w:r></w:del>"
            "<w:hyperlink><w:r><w:t> link</w:t></w:r></w:hyperlink></w:p>"
        )
        assert documents.read([docx(tmp_path / "a.docx", body)]) == "new link"

    def test_footnotes_follow(self, tmp_path: Path) -> None:
        notes = f"<w:footnotes {W}><w:footnote>{paragraph('a note')}</w:footnote></w:footnotes>"
        assert documents.read([docx(tmp_path / "a.docx", paragraph("text"), footnotes=notes)]) == "text\n\na note"

    def test_a_text_box_is_read_once(self, tmp_path: Path) -> None:
        box = f"<w:r><w:txbxContent>{paragraph('boxed')}</w:txbxContent></w:r>"
        namespace = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
        either = f"<mc:Choice>{box}</mc:Choice><mc:Fallback>{box}</mc:Fallback>"
        content = f"<mc:AlternateContent {namespace}>{either}</mc:AlternateContent>"
        assert documents.read([docx(tmp_path / "a.docx", f"<w:p><w:r>{content}</w:r></w:p>")]) == "boxed"

    def test_what_is_wrong_is_said(self, tmp_path: Path) -> None:
        assert "not a whole DOCX" in refusal(write(tmp_path / "a.docx", "text"))
        assert "has no word/document.xml" in refusal(archive(tmp_path / "b.docx", {"x": ""}))
        assert "entities" in refusal(archive(tmp_path / "c.docx", {"word/document.xml": BOMB + "<a>&b;</a>"}))
        assert "no text" in refusal(docx(tmp_path / "d.docx", ""))
        utf16 = (BOMB + "<a>&b;</a>").encode("utf-16")
        assert "entities" in refusal(archive(tmp_path / "e.docx", {"word/document.xml": utf16}))


def pdf(path: Path, *pages: str) -> Path:
    """A PDF whose pages hold these lines in Helvetica."""
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(300, 300)
        lines = "".join(f"({line}) Tj 0 -14 Td " for line in text.splitlines())
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 250 Td {lines}ET".encode())
        page[NameObject("/Contents")] = stream
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
    writer.write(path)
    return path


class TestPDF:
    def test_pages_and_broken_lines(self, tmp_path: Path) -> None:
        path = pdf(tmp_path / "a.pdf", "The quick brown\nfox jum-\nps over.\nA new line.", "", "Page three")
        assert documents.read([path]) == "The quick brown fox jumps over.\nA new line.\n\nPage three"

    def test_is_known_by_its_first_bytes(self, tmp_path: Path) -> None:
        path = pdf(tmp_path / "download", "Some text")
        assert documents.read([path]) == "Some text"

    def test_a_scan_is_told(self, tmp_path: Path) -> None:
        assert "OCR" in refusal(pdf(tmp_path / "a.pdf", "", ""))

    @pytest.mark.parametrize("user_password", ["", "secret"])
    def test_encryption(self, user_password: str, tmp_path: Path) -> None:
        writer = pypdf.PdfWriter(clone_from=pdf(tmp_path / "plain.pdf", "Some text"))
        writer.encrypt(user_password, "owner", algorithm="RC4-128")
        writer.write(tmp_path / "a.pdf")
        if user_password:
            assert "encrypted" in refusal(tmp_path / "a.pdf")
        else:
            assert documents.read([tmp_path / "a.pdf"]) == "Some text"

    def test_damaged_files(self, tmp_path: Path) -> None:
        whole = pdf(tmp_path / "a.pdf", "Some text").read_bytes()
        for data in (b"no pdf", whole[:20], b"%PDF-1.4\n" + bytes(range(256)) * 3):
            assert "damaged PDF" in refusal(write(tmp_path / "bad.pdf", data))

    @given(st.integers(0, 2000), st.binary(min_size=1, max_size=20))
    @settings(max_examples=100, deadline=None)
    def test_any_damage_is_text_or_refused(self, start: int, damage: bytes) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            whole = pdf(Path(folder, "a.pdf"), FOX, FOX).read_bytes()
            path = write(Path(folder, "b.pdf"), whole[:start] + damage + whole[start + len(damage) :])
            try:
                documents.read([path])
            except NectarError as error:
                assert "\n" not in str(error)
