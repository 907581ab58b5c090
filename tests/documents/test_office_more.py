"""Workbooks, presentations, OpenDocument files: numbers, formats, comments, charts, what is hidden."""

from datetime import datetime, time, timedelta
from pathlib import Path

import openpyxl
import pytest

from nectar_mlx.documents.cells import shown
from nectar_mlx.documents.formats import parse
from tests.documents.makers import text_of, zipped
from tests.documents.test_office import pptx
from tests.documents.test_word_parts import CHART

OASIS = "urn:oasis:names:tc:opendocument:xmlns"
SPACES = " ".join(f'xmlns:{name}="{OASIS}:{name}:1.0"' for name in ("office", "text", "style", "table"))
STYLES = (
    '<office:automatic-styles><text:list-style style:name="L"><text:list-level-style-number text:level="1" '
    'style:num-format="1" style:num-suffix="." text:start-value="3"/><text:list-level-style-number text:level="2" '
    'style:num-format="a" style:num-prefix="(" style:num-suffix=")"/></text:list-style><style:style style:name="S">'
    '<style:text-properties style:text-position="super 58%"/></style:style></office:automatic-styles>'
)


def content(body: str) -> str:
    text = f"<office:body><office:text>{body}</office:text></office:body>"
    return f"<office:document {SPACES}>{STYLES}{text}</office:document>"


ITEM = "<text:list-item><text:p>{}</text:p>{}</text:list-item>"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            '<text:list text:style-name="L">'
            + ITEM.format("one", "<text:p>still one</text:p>")
            + ITEM.format("two", "<text:list>" + ITEM.format("sub", "") + ITEM.format("more", "") + "</text:list>")
            + "</text:list>",
            "3. one\n- still one\n4. two\n  (a) sub\n  (b) more",
        ),
        ("<text:list>" + ITEM.format("dot", "") + "</text:list>", "- dot"),
        ('<text:p>m<text:span text:style-name="S">2</text:span></text:p>', "m^2"),
        (
            "<text:p><text:ruby><text:ruby-base>東京</text:ruby-base><text:ruby-text>とう</text:ruby-text></text:ruby></text:p>",
            "東京(とう)",
        ),
        (
            '<text:p>a<text:hidden-text text:is-hidden="true">b</text:hidden-text></text:p>'
            '<text:section text:display="none"><text:p>c</text:p></text:section>',
            "a",
        ),
    ],
)
def test_opendocument(body: str, text: str) -> None:
    assert parse(content(body).encode(), "a.fodt").text == text
    assert parse(zipped({"content.xml": content(body)}), "a.odt").text == text


def test_comments_boxes_and_hidden_sheets(tmp_path: Path) -> None:
    workbook = openpyxl.Workbook()
    workbook.worksheets[0].title = "Open"
    workbook["Open"]["B2"] = "x"
    workbook["Open"]["B2"].comment = openpyxl.comments.Comment("Ask Bob", "Al")
    workbook.create_sheet("Kept").append([1])
    workbook["Kept"].sheet_state = "hidden"
    workbook.save(tmp_path / "a.xlsx")
    text = text_of(tmp_path / "a.xlsx")
    assert text == "## Sheet Open\n\n | x\n\nComment B2: Ask Bob\n\n## Sheet Kept (hidden)\n\n1"


@pytest.mark.parametrize(
    ("value", "number_format", "text"),
    [
        (75, '0 "kg"', "75 kg"),
        (1234.5, '#,##0.00 "€"', "1234.5 €"),
        (98765, "$#,##0", "$98765"),
        (12, "[$€-407] #,##0.00;[Red]-0", "€ 12"),
        (-5, '_-* #,##0\\ "kr"_-', "-5 kr"),
        (123, "00000", "00123"),
        (0.1234, "0.00%", "12.34%"),
        (3, "General", "3"),
        (3, "0.0E+00", "3"),
        (7, "Standard", "7"),
        (datetime(2023, 7, 9, 23, 59, 59), "", "2023-07-09 23:59:59"),
        (time(8, 5), "", "08:05"),
        (timedelta(hours=30, minutes=15), "", "30:15"),
    ],
)
def test_values_have_the_unit_of_their_format(value: object, number_format: str, text: str) -> None:
    assert shown(value, number_format) == text


def test_charts_and_raised_numbers_on_slides(tmp_path: Path) -> None:
    run = '<a:r><a:rPr baseline="{}"/><a:t>{}</a:t></a:r>'
    runs = run.format(0, "10") + run.format(30000, "6") + run.format(-25000, "2")
    slide = f"<p:sp><p:txBody><a:p>{runs}</a:p></p:txBody></p:sp>"
    relation = '<Relationships><Relationship Id="c" Type="x/chart" Target="../charts/c.xml"/></Relationships>'
    others = {"ppt/slides/_rels/s0.xml.rels": relation, "ppt/charts/c.xml": CHART}
    text = text_of(pptx(tmp_path / "a.pptx", slide, **others))
    assert text == "## Slide 1\n\n10^62\n\nSales\n | 2023\nNorth | 41\nSouth | 59"
