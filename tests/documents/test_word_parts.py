"""Word's fields, numbers, styles, changes, inserted documents, charts and symbols."""

import pytest

from nectar_mlx.documents.formats import parse
from nectar_mlx.documents.reading import Document
from tests.documents.makers import zipped
from tests.documents.test_docx import TRANSITIONAL, paragraph, run, table

R = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
NAMESPACES = f'xmlns:w="{TRANSITIONAL}" xmlns:r="{R}" xmlns:c="http://c" xmlns:o="urn:o" xmlns:v="urn:v"'


def document(body: str, parts: dict[str, tuple[str, str | bytes]] | None = None) -> Document:
    """A document with these parts: by name, their kind and what is in them."""
    parts = parts or {}
    relations = "".join(
        f'<Relationship Id="{name}" Type="{R}/{kind}" Target="{name}"/>' for name, (kind, _) in parts.items()
    )
    members: dict[str, str | bytes] = {
        "word/document.xml": f"<w:document {NAMESPACES}><w:body>{body}</w:body></w:document>",
        "word/_rels/document.xml.rels": f"<Relationships>{relations}</Relationships>",
        **{f"word/{name}": content for name, (_, content) in parts.items()},
    }
    return parse(zipped(members), "a.docx")


def field(kind: str, data: str = "") -> str:
    return f'<w:r><w:fldChar w:fldCharType="{kind}">{data}</w:fldChar></w:r>'


def code(text: str) -> str:
    return f"<w:r><w:instrText>{text}</w:instrText></w:r>"


NESTED = field("begin") + code("MERGEFIELD sex") + field("separate") + run("«sex»") + field("end")
TICKED = "<w:ffData><w:checkBox><w:checked/></w:checkBox></w:ffData>"
CHOSEN = (
    '<w:ffData><w:ddList><w:result w:val="1"/><w:listEntry w:val="red"/><w:listEntry w:val="green"/></w:ddList>'
    "</w:ffData>"
)


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        (
            run("Dear ") + field("begin") + code("IF ") + NESTED + field("separate") + run("Madam") + field("end"),
            "Dear Madam",
        ),
        (field("begin") + code("IF") + run("no") + field("separate") + run("yes") + field("end") + run("!"), "yes!"),
        (
            field("begin") + code("REF") + run("A field that never ends hides nothing"),
            "A field that never ends hides nothing",
        ),
        (field("begin", TICKED) + code("FORMCHECKBOX") + field("end") + run(" smoker"), "☒ smoker"),
        (field("begin", CHOSEN) + code("FORMDROPDOWN") + field("end"), "green"),
        (
            f"<w:sdt><w:sdtPr><w:showingPlcHdr/></w:sdtPr><w:sdtContent>{run('Enter a name')}</w:sdtContent></w:sdt>"
            + run("here"),
            "here",
        ),
        (
            f"<w:r><w:ruby><w:rt>{run('とうきょう')}</w:rt><w:rubyBase>{run('東京')}</w:rubyBase></w:ruby></w:r>",
            "東京(とうきょう)",
        ),
        ('<w:r><w:sym w:font="Symbol" w:char="F061"/><w:sym w:font="Wingdings" w:char="F0FE"/></w:r>', "α☑"),
        ('<w:r><w:pict><v:textpath string="DRAFT"/></w:pict></w:r>', "DRAFT"),
    ],
)
def test_what_a_run_shows(inside: str, text: str) -> None:
    assert document(f"<w:p>{inside}</w:p>").text == text


def test_what_follows_a_deleted_mark_goes_on() -> None:
    ended = "<w:p><w:pPr><w:rPr><w:del/></w:rPr></w:pPr>{}</w:p>"
    body = ended.format(run("The first, ")) + ended.format(run("the second ")) + paragraph("and the third.")
    assert document(body + ended.format(run("Last"))).text == "The first, the second and the third.\n\nLast"


SPAN = '<w:gridSpan w:val="%d"/>'


def cell(text: str, properties: str = "") -> str:
    return f"<w:tc><w:tcPr>{properties}</w:tcPr>{paragraph(text)}</w:tc>"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            f"<w:tr>{cell('Item')}{cell('Prices', SPAN % 2)}{cell('Note')}</w:tr>"
            f"<w:tr>{cell('')}{cell('2023')}{cell('2024')}{cell('x')}</w:tr>",
            "Item | Prices |  | Note\n | 2023 | 2024 | x",
        ),
        (f'<w:tr><w:trPr><w:gridBefore w:val="1"/></w:trPr>{cell("second")}</w:tr>', "| second"),
        (f"<w:tr>{cell('one')}{cell('gone', '<w:cellDel/>')}{cell('two')}</w:tr>", "one | two"),
        (f"<w:tr>{cell('one', SPAN % 999999999)}</w:tr>", "one"),
    ],
)
def test_columns(rows: str, text: str) -> None:
    assert document(f"<w:tbl>{rows}</w:tbl>").text.strip() == text


LEVELS = (("decimal", "%1."), ("decimal", "%1.%2"), ("lowerLetter", "(%3)"))
NUMBERING = (
    f'<w:numbering {NAMESPACES}><w:abstractNum w:abstractNumId="0">'
    + "".join(
        f'<w:lvl w:ilvl="{depth}"><w:start w:val="1"/><w:numFmt w:val="{kind}"/><w:lvlText w:val="{text}"/></w:lvl>'
        for depth, (kind, text) in enumerate(LEVELS)
    )
    + '</w:abstractNum><w:abstractNum w:abstractNumId="1"><w:lvl w:ilvl="0"><w:start w:val="4"/>'
    '<w:numFmt w:val="upperRoman"/><w:lvlText w:val="Article %1"/><w:pStyle w:val="Clause"/></w:lvl></w:abstractNum>'
    '<w:abstractNum w:abstractNumId="2"><w:lvl w:ilvl="0"><w:numFmt w:val="bullet"/></w:lvl></w:abstractNum>'
    + "".join(f'<w:num w:numId="{n}"><w:abstractNumId w:val="{n - 1}"/></w:num>' for n in (1, 2, 3))
    + '<w:num w:numId="4"><w:abstractNumId w:val="0"/><w:lvlOverride w:ilvl="0"><w:startOverride w:val="7"/>'
    "</w:lvlOverride></w:num></w:numbering>"
)
STYLES = (
    f'<w:styles {NAMESPACES}><w:style w:styleId="H"><w:name w:val="heading 2"/></w:style>'
    '<w:style w:styleId="Own"><w:name w:val="Own"/><w:basedOn w:val="H"/></w:style>'
    '<w:style w:styleId="Loop"><w:name w:val="Loop"/><w:basedOn w:val="Loop"/></w:style>'
    '<w:style w:styleId="Clause"><w:name w:val="C"/><w:pPr><w:numPr><w:numId w:val="2"/></w:numPr></w:pPr></w:style>'
    "</w:styles>"
)
PARTS: dict[str, tuple[str, str | bytes]] = {
    "numbering.xml": ("numbering", NUMBERING),
    "styles.xml": ("styles", STYLES),
}


def item(text: str, number: int, level: int = 0) -> str:
    return (
        f'<w:p><w:pPr><w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="{number}"/></w:numPr></w:pPr>{run(text)}</w:p>'
    )


def styled(text: str, properties: str) -> str:
    return f"<w:p><w:pPr>{properties}</w:pPr>{run(text)}</w:p>"


def test_numbers_are_those_that_word_shows() -> None:
    body = item("Scope", 1) + item("Terms", 1) + item("Rent", 1, 1) + item("late", 1, 2) + item("early", 1, 2)
    body += item("Fees", 1, 1) + item("never", 1, 2) + item("End", 1) + item("anew", 4) + item("plain", 0)
    shown = ["1. Scope", "2. Terms", "2.1 Rent", "(a) late", "(b) early", "2.2 Fees", "(a) never", "3. End", "7. anew"]
    lines = [line.strip() for line in document(body, PARTS).text.split("\n") if line]
    assert lines == [*shown, "plain"]


def test_styles_number_and_head() -> None:
    body = styled("Peace", '<w:pStyle w:val="Clause"/>') + styled("War", '<w:pStyle w:val="Clause"/>')
    body += item("dot", 3) + styled("Own", '<w:pStyle w:val="Own"/>') + styled("Out", '<w:outlineLvl w:val="2"/>')
    text = document(body + styled("Loop", '<w:pStyle w:val="Loop"/>'), PARTS).text
    assert text == "Article IV Peace\n\nArticle V War\n\n- dot\n\n## Own\n\n### Out\n\nLoop"


def test_inserted_documents() -> None:
    inner = zipped(
        {"word/document.xml": f"<w:document {NAMESPACES}><w:body>{paragraph('inner')}</w:body></w:document>"}
    )
    parts: dict[str, tuple[str, str | bytes]] = {
        "a.html": ("aFChunk", "<p>a <b>page</b></p>"),
        "b.docx": ("aFChunk", inner),
    }
    body = paragraph("Start") + "".join(f'<w:altChunk r:id="{name}"/>' for name in ("a.html", "b.docx", "c.txt"))
    found = document(body, parts)
    assert found.text == "Start\n\na page\n\ninner"
    assert found.left_out == ["an inserted document that the file does not hold"]


def test_a_document_inserted_into_itself_ends() -> None:
    part: tuple[str, str | bytes] = ("aFChunk", "")
    data = b""
    for _ in range(8):
        part = ("aFChunk", data or b"the innermost")
        relation = f'<Relationships><Relationship Id="x" Type="{R}/aFChunk" Target="x.docx"/></Relationships>'
        body = f'<w:document {NAMESPACES}><w:body>{paragraph("outer")}<w:altChunk r:id="x"/></w:body></w:document>'
        data = zipped({"word/document.xml": body, "word/_rels/document.xml.rels": relation, "word/x.docx": part[1]})
    found = parse(data, "a.docx")
    assert found.text.count("outer") == 4 and "attached too deep" in found.left_out[0]


CHART = (
    "<c:chartSpace xmlns:c='http://c' xmlns:a='http://a'><c:chart><c:title><a:t>Sales</a:t></c:title><c:ser>"
    "<c:tx><c:pt idx='0'><c:v>2023</c:v></c:pt></c:tx>"
    "<c:cat><c:pt idx='0'><c:v>North</c:v></c:pt><c:pt idx='1'><c:v>South</c:v></c:pt></c:cat>"
    "<c:val><c:pt idx='0'><c:v>41</c:v></c:pt><c:pt idx='1'><c:v>59</c:v></c:pt></c:val>"
    "</c:ser></c:chart></c:chartSpace>"
)


def test_charts_are_tables_and_objects_are_named() -> None:
    body = '<w:p><w:r><w:drawing><c:chart r:id="c.xml"/></w:drawing></w:r></w:p>'
    body += '<w:p><w:r><w:object><o:OLEObject Type="Embed" ProgID="Excel.Sheet.12"/></w:object></w:r></w:p>'
    found = document(body, {"c.xml": ("chart", CHART)})
    assert found.text == "Sales\n | 2023\nNorth | 41\nSouth | 59"
    assert found.left_out == ["an embedded object (Excel.Sheet.12)"]


def test_a_table_without_spans_is_as_before() -> None:
    assert document(table((paragraph("a"), paragraph("b")))).text == "a | b"
