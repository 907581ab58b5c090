"""Workbooks, presentations, OpenDocument, rich text and notebooks."""

import json
import time
import zipfile
from datetime import date, datetime
from pathlib import Path

import openpyxl
import pytest

from nectar_mlx.documents import sheets
from tests.documents.makers import refusal, report_of, text_of, write, zipped


def xlsx(path: Path, **contents: list[list[object]]) -> Path:
    workbook = openpyxl.Workbook()
    workbook.remove(workbook.worksheets[0])
    for name, rows in contents.items():
        sheet = workbook.create_sheet(name)
        for row in rows:
            sheet.append(row)
    workbook.save(path)
    return path


class TestXLSX:
    def test_values_as_they_are_shown(self, tmp_path: Path) -> None:
        path = xlsx(
            tmp_path / "a.xlsx",
            Costs=[["item", "cost"], ["roof", 1200], [None, None], ["sum", 0.1 + 0.2], ["ok", True]],
            Empty=[],
            Days=[[date(2024, 5, 1), datetime(2024, 5, 1, 14, 30)], ["=A1+1"]],
        )
        text, report = text_of(path), report_of(path)
        costs = "## Sheet Costs\n\nitem | cost\nroof | 1200\nsum | 0.3\nok | TRUE"
        assert text == costs + "\n\n## Sheet Days\n\n2024-05-01 | 2024-05-01 14:30\n=A1+1"
        assert [(place.unit, place.name) for place in report.places] == [("sheet", "Costs"), ("sheet", "Days")]
        assert text[report.places[0].start : report.places[0].end] == costs

    def test_per_cent(self, tmp_path: Path) -> None:
        path = xlsx(tmp_path / "a.xlsx", A=[[0.05]])
        workbook = openpyxl.load_workbook(path)
        workbook["A"]["A1"].number_format = "0.0%"
        workbook.save(path)
        assert text_of(path).endswith("\n5%")

    def test_a_cell_far_away_costs_nothing(self, tmp_path: Path) -> None:
        path = xlsx(tmp_path / "a.xlsx", A=[["near"]])
        workbook = openpyxl.load_workbook(path)
        workbook["A"]["XFD1048576"] = "far"
        workbook.save(path)
        start = time.process_time()
        assert "near" in text_of(path) and "far" in text_of(path)
        assert time.process_time() - start < 6

    def test_cells_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sheets, "MOST_CELLS", 10)
        path = xlsx(tmp_path / "a.xlsx", A=[[1, 2, 3]] * 5)
        assert text_of(path).count("1 | 2 | 3") == 3
        assert report_of(path).left_out == ["sheet A: cells after the first 10 of the file"]

    @pytest.mark.parametrize(
        ("old", "new", "note"),
        [
            (b"</sheetData>", b"<", "sheet Two: damaged after row 10"),
            (b"<worksheet", b"<", "sheet Two: damaged"),
            (b"<v>7</v>", b"<v>x</v>", "sheet Two: damaged after row 7"),
            (None, None, "sheet Two: the file does not hold it"),
        ],
    )
    def test_a_damaged_sheet_costs_no_other(self, old: bytes | None, new: bytes, note: str, tmp_path: Path) -> None:
        workbook = openpyxl.Workbook()
        workbook.worksheets[0].title = "One"
        for name in ("One", "Two", "Three"):
            sheet = workbook["One"] if name == "One" else workbook.create_sheet(name)
            for row in range(10):
                sheet.append([f"{name} {row}", row])
        workbook.save(tmp_path / "whole.xlsx")
        with zipfile.ZipFile(tmp_path / "whole.xlsx") as file:
            members = {name: file.read(name) for name in file.namelist()}
        if old is None:
            del members["xl/worksheets/sheet2.xml"]
        else:
            members["xl/worksheets/sheet2.xml"] = members["xl/worksheets/sheet2.xml"].replace(old, new)
        report = report_of(write(tmp_path / "a.xlsx", zipped(members)))
        assert report.left_out == [note]
        assert {"One", "Three"} <= {place.name for place in report.places}
        assert "One 9 | 9" in text_of(tmp_path / "a.xlsx") and "Three 9 | 9" in text_of(tmp_path / "a.xlsx")

    def test_damaged(self, tmp_path: Path) -> None:
        whole = xlsx(tmp_path / "a.xlsx", A=[[1]]).read_bytes()
        assert "XLSX" in refusal(write(tmp_path / "b.xlsx", whole[: len(whole) // 2]))
        assert "no workbook" in refusal(write(tmp_path / "c.xlsx", zipped({"x": ""})))
        bomb = '<!DOCTYPE a [<!ENTITY a "aaa">]><workbook/>'
        assert "entities" in refusal(write(tmp_path / "d.xlsx", zipped({"xl/workbook.xml": bomb})))
        assert "XLSX" in refusal(write(tmp_path / "e.xlsx", zipped({"xl/workbook.xml": "<workbook>"})))


A = 'xmlns:a="http://a" xmlns:p="http://p" xmlns:r="http://r"'


def shape(text: str, kind: str = "body") -> str:
    paragraphs = "".join(f"<a:p><a:r><a:t>{line}</a:t></a:r></a:p>" for line in text.split("\n"))
    return f'<p:sp><p:nvSpPr><p:nvPr><p:ph type="{kind}"/></p:nvPr></p:nvSpPr><p:txBody>{paragraphs}</p:txBody></p:sp>'


def pptx(path: Path, *slides: str, **others: str) -> Path:
    ids = "".join(f'<p:sldId id="{256 + n}" r:id="r{n}"/>' for n in reversed(range(len(slides))))
    relations = "".join(
        f'<Relationship Id="r{n}" Type="x/slide" Target="slides/s{n}.xml"/>' for n in range(len(slides))
    )
    members = {
        "ppt/presentation.xml": f"<p:presentation {A}><p:sldIdLst>{ids}</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": f"<Relationships>{relations}</Relationships>",
    }
    for number, slide in enumerate(slides):
        if slide:
            members[f"ppt/slides/s{number}.xml"] = f"<p:sld {A}><p:cSld><p:spTree>{slide}</p:spTree></p:cSld></p:sld>"
    return write(path, zipped(members | others))


class TestPPTX:
    def test_slides_in_their_order_with_notes(self, tmp_path: Path) -> None:
        cell = "<a:tc><a:txBody><a:p><a:r><a:t>{}</a:t></a:r></a:p></a:txBody></a:tc>"
        table = f"<a:tbl><a:tr>{cell.format('k')}{cell.format('v')}</a:tr></a:tbl>"
        notes = '<Relationships><Relationship Id="n" Type="x/notesSlide" Target="../notes/n.xml"/></Relationships>'
        others = {
            "ppt/slides/_rels/s1.xml.rels": notes,
            "ppt/notes/n.xml": f"<p:notes {A}>{shape('Say hello')}{shape('2', 'sldNum')}</p:notes>",
        }
        second = shape("Plan", "title") + shape("one\ntwo") + table + shape("7", "sldNum")
        path = pptx(tmp_path / "a.pptx", shape("last"), second, **others)
        text, report = text_of(path), report_of(path)
        assert text == ("## Slide 1\n\n### Plan\n\none\ntwo\n\nk | v\n\nNotes: Say hello\n\n## Slide 2\n\nlast")
        assert [(place.unit, place.name, text[place.start : place.start + 10]) for place in report.places] == [
            ("slide", "1", "## Slide 1"),
            ("slide", "2", "## Slide 2"),
        ]

    def test_a_missing_slide_is_named(self, tmp_path: Path) -> None:
        path = pptx(tmp_path / "a.pptx", "", shape("here"))
        assert report_of(path).left_out == ["slide 2: the file does not hold it"]

    def test_damaged(self, tmp_path: Path) -> None:
        path = pptx(tmp_path / "a.pptx", "<a:p>" * 1000)
        assert "damaged PPTX" in str(report_of(pptx(tmp_path / "b.pptx", "<a:p>", shape("x"))).left_out)
        assert "deep" in refusal(path) or "no text" in refusal(path)
        assert "PPTX" in refusal(write(tmp_path / "c.pptx", path.read_bytes()[:300]))


SPACES = 'xmlns:office="o" xmlns:text="t" xmlns:table="b" xmlns:draw="d" xmlns:xlink="l" xmlns:math="m"'


def odt(path: Path, content: str, kind: str = "text", **others: str) -> Path:
    body = f"<office:document-content {SPACES}><office:body><office:{kind}>{content}</office:{kind}></office:body>"
    return write(path, zipped({"content.xml": body + "</office:document-content>"} | others))


class TestOpenDocument:
    def test_text(self, tmp_path: Path) -> None:
        content = (
            '<text:h text:outline-level="2">Kapitel</text:h><text:p>One<text:s text:c="2"/>two<text:tab/>x'
            "<text:line-break/>y <text:span>bold</text:span>.</text:p>"
            "<text:list><text:list-item><text:p>a</text:p><text:list><text:list-item><text:p>b</text:p>"
            "</text:list-item></text:list></text:list-item></text:list>"
            "<table:table><table:table-row><table:table-cell><text:p>k</text:p></table:table-cell>"
            "<table:table-cell><text:p>v</text:p></table:table-cell></table:table-row></table:table>"
            "<text:p>See<text:note><text:note-citation>1</text:note-citation><text:note-body><text:p>a note</text:p>"
            "</text:note-body></text:note>.</text:p><text:tracked-changes><text:p>gone</text:p></text:tracked-changes>"
        )
        text = "## Kapitel\n\nOne  two\tx\ny bold.\n\n- a\n  - b\n\nk | v\n\nSee[1].\n\n[1] a note"
        assert text_of(odt(tmp_path / "a.odt", content)) == text

    def test_sheets_with_repeated_cells(self, tmp_path: Path) -> None:
        cell = "<table:table-cell{}><text:p>{}</text:p></table:table-cell>"
        rest = '<table:table-cell table:number-columns-repeated="16384"/>'
        row = f"<table:table-row>{cell.format('', 'roof')}{cell.format('', '1200')}{rest}</table:table-row>"
        empty = f'<table:table-row table:number-rows-repeated="1048576">{rest}</table:table-row>'
        twice = f'<table:table-row table:number-rows-repeated="2">{cell.format("", "x")}</table:table-row>'
        content = f'<table:table table:name="Costs">{row}{twice}{empty}</table:table>'
        path = odt(tmp_path / "a.ods", content, "spreadsheet")
        assert text_of(path) == "## Sheet Costs\n\nroof | 1200\nx\nx"
        assert report_of(path).kind == "ods"

    def test_repeats_do_not_multiply(self, tmp_path: Path) -> None:
        cell = '<table:table-cell table:number-columns-repeated="999999999"><text:p>x</text:p></table:table-cell>'
        row = f'<table:table-row table:number-rows-repeated="999999999">{cell * 50}</table:table-row>'
        path = odt(tmp_path / "a.ods", f"<table:table>{row * 50}</table:table>", "spreadsheet")
        start = time.process_time()
        assert len(text_of(path)) < 1 << 25
        assert time.process_time() - start < 5
        assert "repeats of cells" in str(report_of(path).left_out)

    def test_slides_and_formulas(self, tmp_path: Path) -> None:
        math = "<math:mi>E</math:mi><math:mo>=</math:mo><math:mi>m</math:mi>"
        frame = '<draw:frame><draw:object xlink:href="./Object 1"/><draw:image/></draw:frame>'
        others = {"Object 1/content.xml": f'<math:math xmlns:math="m">{math}</math:math>'}
        path = odt(tmp_path / "a.odp", f"<draw:page><text:p>hi</text:p>{frame}</draw:page>", "presentation", **others)
        assert text_of(path) == "## Slide 1\n\nhi\n\nE=m"
        text = text_of(odt(tmp_path / "a.odt", f"<text:p>so {frame} holds</text:p>", **others))
        assert text == "so E=m holds"

    def test_damaged_and_encrypted(self, tmp_path: Path) -> None:
        assert "has no content.xml" in refusal(write(tmp_path / "a.odt", zipped({"x": ""})))
        manifest = {"META-INF/manifest.xml": "<manifest:algorithm/>"}
        assert "encrypted" in refusal(odt(tmp_path / "b.odt", "<text:p>x</text:p>", **manifest))


class TestRTF:
    @pytest.mark.parametrize(
        ("rtf", "text"),
        [
            (r"{\rtf1\ansi Plan B}", "Plan B"),
            (r"{\rtf1\ansi\ansicpg1251 \'cf\'f0\'e8\'e2\'e5\'f2}", "Привет"),
            (r"{\rtf1\ansi\uc1 caf\u233?, \u8364 ?10, 1\_24 drops \u-10179?\u-8694?}", "café, €10, 1\u201124 drops 😊"),
            (r"{\rtf1 \trowd a\cell b\cell\row\trowd c\cell d\cell\row}", "a | b\nc | d"),
            (r"{\rtf1{\fonttbl{\f0 Arial;}}text{\footnote note} {\*\generator x}{\pict 89504e47}\par next}",
             "text[1]\nnext\n\n[1] note"),
            (r"{\rtf1\mac caf\'8e{\v hidden} {\deleted 900}950}", "café 950"),
            (r"{\rtf1{\fonttbl{\f0\fcharset0 A;}{\f1\fcharset204 A;}{\f2\fcharset238 A;}{\f3\fcharset2 S;}}\f0 caf\'e9 "
             r"\f1\'cc\'e8\'f0 \f2\'b9 \f3\'b7}", "café Мир ą •"),
            (r"{\rtf1{\fonttbl{\f0\fcharset128 M;}}\f0\'93\'fa\'96\'7b}", "日本"),
            (r"{\rtf1\uc2 a\u8364\'80\'80b\uc0 c\u8364 d}", "a€bc€d"),
            (r"{\rtf1 Start\par\trowd\pard\intbl a\par b\cell c\cell\row\pard end}", "Start\na b | c\nend"),
            (r"{\rtf1 {\*\annotation remark}x{\upr{old}{\*\ud new}}{\field{\*\fldinst LINK}{\fldrslt site}}}",
             "[1]xnewsite\n\n[1] remark"),
            (r"{\rtf1 {\shp{\*\shpinst{\sp{\sn a}{\sv 1}}{\shptxt boxed\par}}{\shprslt old}}after}", "boxed\nafter"),
            ("{\\rtf1 A {\\pict\\bin8 }{}}}{{x} B}", "A  B"),
            (r"{\rtf1 10{\super 6} m}", "10^6 m"),
            (r"{\rtf1 un\'e9 soft\-hyphen}", "uné softhyphen"),
        ],
    )  # fmt: skip
    def test_text(self, rtf: str, text: str, tmp_path: Path) -> None:
        lines = [line.strip() for line in text_of(write(tmp_path / "a.rtf", rtf)).split("\n")]
        assert lines == [line.strip() for line in text.split("\n")]

    def test_pictures_are_counted(self, tmp_path: Path) -> None:
        assert report_of(write(tmp_path / "a.rtf", r"{\rtf1 x{\pict 89504e47}}")).left_out == ["1 picture"]

    def test_damaged(self, tmp_path: Path) -> None:
        assert "not an RTF file" in refusal(write(tmp_path / "a.rtf", "text"))
        start = time.process_time()
        assert "no text" in refusal(write(tmp_path / "b.rtf", "{\\rtf1" + "{" * 300_000))
        assert time.process_time() - start < 3


class TestNotebook:
    def test_cells(self, tmp_path: Path) -> None:
        cells = [
            {"cell_type": "markdown", "source": ["# Title\n", "text"]},
            {
                "cell_type": "code",
                "source": "print(1)",
                "outputs": [
                    {"output_type": "stream", "text": ["1\n"]},
                    {"output_type": "display_data", "data": {"image/png": "iVBOR" * 99, "text/plain": "<Figure>"}},
                    {"output_type": "execute_result", "data": {"text/html": "<table><tr><td>a<td>b</table>"}},
                    {"output_type": "error", "ename": "ValueError", "evalue": "bad", "traceback": ["\x1b[31m"]},
                ],
            },
            {"cell_type": "code", "source": []},
            "no cell",
        ]
        notebook = {"cells": cells, "metadata": {"language_info": {"name": "python"}}}
        path = write(tmp_path / "a.ipynb", json.dumps(notebook))
        assert text_of(path) == (
            "# Title\ntext\n\n```python\nprint(1)\n```\n\nOutput:\n```\n1\n```\n\nOutput:\n```\na | b\n```"
            "\n\nOutput:\n```\nValueError: bad\n```"
        )
        report = report_of(path)
        assert [place.name for place in report.places] == ["1", "2"]
        assert report.left_out == ["1 output without text (pictures)"]

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"cells": 3}', "[" * 100_000, '{"cells": [{"outputs": 3}]}', "null"]
    )
    def test_damaged(self, content: str, tmp_path: Path) -> None:
        assert "a.ipynb" in refusal(write(tmp_path / "a.ipynb", content))


def test_data_and_code_are_read_as_they_are(tmp_path: Path) -> None:
    for name, text in {
        "a.csv": "item,cost\nroof,1200", "b.json": '{"a": 1}', "c.yaml": "a: 1\nb:\n  - x", "d.log": "12:00 ok",
        "e.py": "for x in y:\n    pass", "f.tsv": "a\tb", "g.toml": "[a]\nb = 1", "h.tex": "\\section{A}",
    }.items():  # fmt: skip
        assert text_of(write(tmp_path / name, text)) == text
