"""Word documents: everything that Word shows, once, and files made to do harm."""

import time
from pathlib import Path

import pytest

from tests.documents.makers import refusal, report_of, text_of, write, zipped

TRANSITIONAL = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
STRICT = "http://purl.oclc.org/ooxml/wordprocessingml/main"
M = 'xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"'
W = f'xmlns:w="{TRANSITIONAL}"'
STYLES = f"""<w:styles {W}><w:style w:styleId="berschrift2"><w:name w:val="heading 2"/></w:style>
<w:style w:styleId="Titel"><w:name w:val="Title"/></w:style></w:styles>"""


def paragraph(text: str, properties: str = "") -> str:
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"


def run(text: str, properties: str = "") -> str:
    return f'<w:r><w:rPr>{properties}</w:rPr><w:t xml:space="preserve">{text}</w:t></w:r>'


def table(*rows: tuple[str, ...]) -> str:
    cells = ("".join(f"<w:tc>{cell}</w:tc>" for cell in row) for row in rows)
    return "<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in cells) + "</w:tbl>"


def docx(path: Path, body: str, *, namespace: str = TRANSITIONAL, **others: str) -> Path:
    document = f'<w:document xmlns:w="{namespace}" {M}><w:body>{body}</w:body></w:document>'
    members = {"word/document.xml": document, "word/styles.xml": STYLES}
    return write(path, zipped(members | {f"word/{name}.xml": content for name, content in others.items()}))


def test_paragraphs_headings_lists_and_tables(tmp_path: Path) -> None:
    item = '<w:numPr><w:ilvl w:val="%s"/><w:numId w:val="1"/></w:numPr>'
    body = (
        paragraph("Report", '<w:pStyle w:val="Titel"/>')
        + paragraph("Kapitel", '<w:pStyle w:val="berschrift2"/>')
        + f"<w:p>{run('One ')}<w:r><w:t>two</w:t><w:tab/><w:t>three</w:t></w:r></w:p>"
        + paragraph("")
        + paragraph("a", item % 0)
        + paragraph("b", item % 1)
        + table((paragraph("k"), paragraph("v")), (paragraph("1"), paragraph("")))
        + paragraph("end")
    )
    text = "# Report\n\n## Kapitel\n\nOne two\tthree\n\n- a\n  - b\n\nk | v\n1\n\nend"
    assert text_of(docx(tmp_path / "a.docx", body)) == text


@pytest.mark.parametrize("level", ["²", "x", "-1", "99999999999", ""])
def test_a_level_that_is_no_number(level: str, tmp_path: Path) -> None:
    body = paragraph("a", f'<w:numPr><w:ilvl w:val="{level}"/></w:numPr>')
    assert text_of(docx(tmp_path / "a.docx", body)) == "- a"


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        (run("Take 1") + "<w:r><w:noBreakHyphen/></w:r>" + run("24 drops"), "Take 1\u201124 drops"),
        ("<w:r><w:t>a</w:t><w:noBreakHyphen/><w:t>b</w:t><w:softHyphen/><w:t>c</w:t></w:r>", "a\u2011bc"),
        (run("10") + run("6", '<w:vertAlign w:val="superscript"/>') + run(" m"), "10^6 m"),
        (run("seen") + run("not", "<w:vanish/>"), "seen"),
        (run("seen") + run(" too", '<w:vanish w:val="0"/>'), "seen too"),
        ("<w:ins>" + run("new") + "</w:ins><w:del><w:r><w:delText>old</w:delText></w:r></w:del>", "new"),
        ("<w:moveFrom>" + run("moved") + "</w:moveFrom><w:moveTo>" + run("moved") + "</w:moveTo>", "moved"),
        (
            "<w:hyperlink>"
            + run("link")
            + "</w:hyperlink><w:sdt><w:sdtContent>"
            + run("!")
            + "</w:sdtContent></w:sdt>",
            "link!",
        ),
        ("<w:r><w:fldChar/><w:instrText>PAGE</w:instrText></w:r>" + run("5"), "5"),
        ('<w:r><w:sym w:font="Symbol" w:char="F0B7"/></w:r><w:r><w:sym w:char="2192"/></w:r>', "•→"),
        (run("a") + "<w:r><w:br/></w:r>" + run("b"), "a\nb"),
    ],
)
def test_what_a_paragraph_shows(inside: str, text: str, tmp_path: Path) -> None:
    assert text_of(docx(tmp_path / "a.docx", f"<w:p>{inside}</w:p>")) == text


def r(text: str) -> str:
    return f"<m:r><m:t>{text}</m:t></m:r>"


@pytest.mark.parametrize(
    ("equation", "text"),
    [
        (r("A=") + f"<m:f><m:num>{r('a+b')}</m:num><m:den>{r('2')}</m:den></m:f>" + r("h"), "A=(a+b)/2 h"),
        (r("E=m") + f"<m:sSup><m:e>{r('c')}</m:e><m:sup>{r('2')}</m:sup></m:sSup>", "E=mc^2"),
        (f"<m:sSub><m:e>{r('x')}</m:e><m:sub>{r('i+1')}</m:sub></m:sSub>", "x_(i+1)"),
        (f"<m:rad><m:deg/><m:e>{r('x')}</m:e></m:rad>", "√(x)"),
        (
            "<m:d><m:dPr><m:begChr m:val='['/><m:endChr m:val=']'/></m:dPr>"
            f"<m:e>{r('x')}</m:e><m:e>{r('y')}</m:e></m:d>",
            "[x,y]",
        ),
        (
            f"<m:nary><m:naryPr><m:chr m:val='∑'/></m:naryPr><m:sub>{r('i=1')}</m:sub><m:sup>{r('n')}</m:sup>"
            f"<m:e>{r('i')}</m:e></m:nary>",
            "∑_(i=1)^n i",
        ),
    ],
)
def test_equations(equation: str, text: str, tmp_path: Path) -> None:
    math = f"<m:oMath>{equation}</m:oMath>"
    body = f"<w:p>{run('so ')}{math}{run(' holds')}</w:p><w:p><m:oMathPara>{math}</m:oMathPara></w:p>"
    assert text_of(docx(tmp_path / "a.docx", body)) == f"so {text} holds\n\n{text}"


def test_a_table_in_a_cell_is_read_once(tmp_path: Path) -> None:
    inner = table((paragraph("north"), paragraph("17")), (paragraph("south"), paragraph("23")))
    body = table(
        (paragraph("Region"), paragraph("Sales") + inner + paragraph("")), (paragraph("Total"), paragraph("40"))
    )
    text = text_of(docx(tmp_path / "a.docx", body))
    assert text == "Region | Sales; north, 17; south, 23\nTotal | 40"


def test_tables_in_tables_do_not_multiply(tmp_path: Path) -> None:
    body = paragraph("x")
    for _ in range(40):
        body = table((body + paragraph(""),))
    start = time.process_time()
    assert text_of(docx(tmp_path / "a.docx", body)) == "x"
    assert time.process_time() - start < 1
    for _ in range(100):
        body = table((body,))
    assert "nested more than 200 deep" in refusal(docx(tmp_path / "b.docx", body))


def test_rows_that_were_deleted(tmp_path: Path) -> None:
    deleted = f"<w:tr><w:trPr><w:del/></w:trPr><w:tc>{paragraph('old')}</w:tc></w:tr>"
    body = f"<w:tbl>{deleted}<w:tr><w:tc>{paragraph('new')}</w:tc></w:tr></w:tbl>"
    assert text_of(docx(tmp_path / "a.docx", body)) == "new"


def test_notes_headers_and_comments(tmp_path: Path) -> None:
    line = f'<w:footnote w:type="separator" w:id="0">{paragraph("---")}</w:footnote>'
    notes = f'<w:footnotes {W}>{line}<w:footnote w:id="1">{paragraph("a foot")}</w:footnote></w:footnotes>'
    ends = f'<w:endnotes {W}><w:endnote w:id="2">{paragraph("an end")}</w:endnote></w:endnotes>'
    comments = f'<w:comments {W}><w:comment w:id="3">{paragraph("a remark")}</w:comment></w:comments>'
    relations = "".join(
        f'<Relationship Id="r{number}" Type="http://x/relationships/{kind}" Target="{kind}{number}.xml"/>'
        for number, kind in enumerate(("header", "header", "footer", "footer"))
    )
    reference = '<w:r><w:footnoteReference w:id="1"/></w:r>'
    members = {
        "word/document.xml": f"<w:document {W}><w:body><w:p>{run('text')}{reference}</w:p></w:body></w:document>",
        "word/_rels/document.xml.rels": f"<Relationships>{relations}</Relationships>",
        "word/footnotes.xml": notes,
        "word/endnotes.xml": ends,
        "word/comments.xml": comments,
        "word/header0.xml": f"<w:hdr {W}>{paragraph('Acme Ltd')}</w:hdr>",
        "word/header1.xml": f"<w:hdr {W}>{paragraph('Acme Ltd')}</w:hdr>",
        "word/footer2.xml": f"<w:ftr {W}>{paragraph('3')}</w:ftr>",
        "word/footer3.xml": f"<w:ftr {W}>{paragraph('Secret')}</w:ftr>",
    }
    text = text_of(write(tmp_path / "a.docx", zipped(members)))
    assert text == "Acme Ltd\n\ntext[1]\n\nSecret\n\n[1] a foot\n\n[2] an end\n\n[3] a remark"


def test_strict_documents(tmp_path: Path) -> None:
    path = docx(
        tmp_path / "a.docx", paragraph("Kapitel", '<w:pStyle w:val="x"/>') + paragraph("text"), namespace=STRICT
    )
    assert text_of(path) == "Kapitel\n\ntext"


def test_the_document_lies_where_the_relations_say(tmp_path: Path) -> None:
    relation = '<Relationship Id="r" Type="http://x/officeDocument" Target="/other/doc2.xml"/>'
    document = f"<w:document {W}><w:body>{paragraph('here')}</w:body></w:document>"
    members = {"_rels/.rels": f"<Relationships>{relation}</Relationships>", "other/doc2.xml": document}
    assert text_of(write(tmp_path / "a.docx", zipped(members))) == "here"


def test_a_text_box_is_read_once_and_pictures_are_counted(tmp_path: Path) -> None:
    box = f"<w:r><w:txbxContent>{paragraph('boxed')}</w:txbxContent></w:r>"
    namespace = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    either = f"<mc:Choice>{box}</mc:Choice><mc:Fallback>{box}</mc:Fallback>"
    content = f"<mc:AlternateContent {namespace}>{either}</mc:AlternateContent>"
    picture = '<w:r><w:drawing><w:docPr descr="A map of Bonn"/><w:pic/></w:drawing></w:r>'
    path = docx(tmp_path / "a.docx", f"<w:p><w:r>{content}</w:r></w:p><w:p>{picture}</w:p>")
    assert text_of(path) == "boxed\n\n[A map of Bonn]"
    assert report_of(path).left_out == ["1 picture"]


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
DEFAULTS = f'<!DOCTYPE w:document [<!ATTLIST w:p a CDATA "{"x" * 10000}">]>'


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (BOMB + "<a>&b;</a>", "entities"),
        ((BOMB + "<a>&b;</a>").encode("utf-16"), "entities"),
        (DEFAULTS + f"<w:document {W}/>", "entities"),
        ("<a>" * 100_000, "nested more than 200 deep"),
        ("<a", "damaged"),
        ('<?xml version="1.0" encoding="no-such"?><a/>', "damaged"),
        ("", "damaged"),
        ("\ud83d<a/>".encode("utf-8", "surrogatepass"), "damaged"),
        (f"<w:document {W}><w:body/></w:document>", "no text"),
    ],
)
def test_what_is_wrong_is_said(document: str | bytes, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(write(tmp_path / "a.docx", zipped({"word/document.xml": document})))


def test_what_is_no_document(tmp_path: Path) -> None:
    assert "not a whole DOCX" in refusal(write(tmp_path / "a.docx", "text"))
    assert "has no word/document.xml" in refusal(write(tmp_path / "b.docx", zipped({"x": ""})))
