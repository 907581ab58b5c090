"""PDF files: forms and comments, initials, letters set apart, close cells of tables, hyphens of several languages."""

from pathlib import Path

import pytest

from tests.documents.makers import column, pdf, pdf_file, pdf_pages, report_of, shown, stream, text_of, write


def annotated(*annotations: bytes, form: bool = False) -> bytes:
    """A page "Application" with these annotations, all fields of a form where there is one."""
    first = 6
    places = b" ".join(b"%d 0 R" % (first + number) for number in range(len(annotations)))
    fields = b"/AcroForm << /Fields [%b] /DA (/F1 10 Tf) /DR << >> >>" % places if form else b""
    return pdf_file(
        [
            b"<< /Type /Catalog /Pages 2 0 R %b >>" % fields,
            b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 5 0 R /Annots [%b] "
            b"/Resources << /Font << /F1 4 0 R >> >> >>" % places,
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
            stream(shown([(50, 750, 12, "Application"), (50, 700, 12, "Name:")])),
            *annotations,
        ]
    )


def widget(kind: bytes, value: bytes, *, bottom: int = 695) -> bytes:
    return (
        b"<< /Type /Annot /Subtype /Widget /F 4 /FT /%b /T (f%d) /Rect [120 %d 300 %d] %b >>"
        % (kind, bottom, bottom, bottom + 20, value)
    )  # fmt: skip


@pytest.mark.parametrize("form", [True, False])
def test_what_is_filled_in_is_read(form: bool, tmp_path: Path) -> None:
    data = annotated(widget(b"Tx", b"/V (Wanda Nowak)"), form=form)
    assert "Name: Wanda Nowak" in text_of(write(tmp_path / "a.pdf", data)).replace(" | ", " ")


def test_boxes_to_tick(tmp_path: Path) -> None:
    states = [b"/AS /%b /V /%b /AP << /N << /Yes 4 0 R /Off 4 0 R >> >>" % (state, state) for state in (b"Yes", b"Off")]
    data = annotated(widget(b"Btn", states[0]), widget(b"Btn", states[1], bottom=500), form=True)
    text = text_of(write(tmp_path / "a.pdf", data))
    assert text.count("☒") == 1 and text.count("☐") == 1


def test_typed_texts_and_comments(tmp_path: Path) -> None:
    typed = b"<< /Type /Annot /Subtype /FreeText /Rect [50 600 300 620] /Contents (Typed here) >>"
    note = b"<< /Type /Annot /Subtype /Text /Rect [50 600 60 610] /Contents (A \\(small\\) remark) >>"
    link = b"<< /Type /Annot /Subtype /Link /Rect [50 600 60 610] /Contents (no text) >>"
    text = text_of(write(tmp_path / "a.pdf", annotated(typed, note, link)))
    assert "Typed here" in text and text.endswith("Comment: A (small) remark") and "no text" not in text


def test_attachments_are_named(tmp_path: Path) -> None:
    catalog = b"<< /Type /Catalog /Pages 2 0 R "
    data = annotated().replace(
        catalog,
        catalog + b"/Names << /EmbeddedFiles << /Names [(d.csv) << /Type /Filespec /F (d.csv) /UF (d.csv) >>] >> >> ",
    )
    assert report_of(write(tmp_path / "a.pdf", data)).left_out == ["attachment d.csv"]


def test_a_file_whose_end_is_lost(tmp_path: Path) -> None:
    whole = pdf([(50, 750, 12, "Still here")])
    assert text_of(write(tmp_path / "a.pdf", whole[: whole.rfind(b"xref\n0")])) == "Still here"


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["Die Zahlen der Ein-", "und Ausfuhr liegen vor."], "Die Zahlen der Ein- und Ausfuhr liegen vor."),
        (
            ["It is a study of all the pre-", "and post-war trade there."],
            "It is a study of all the pre- and post-war trade there.",
        ),
        (
            ["Elle a peut-", "être raison, dit-", "il, et lui-", "même."],
            "Elle a peut-être raison, dit-il, et lui-même.",
        ),
        (["La gouver-", "nance du vice-", "président fut bonne."], "La gouvernance du vice-président fut bonne."),
        (["Сильный юго-", "западный ветер и програм-", "мирование."], "Сильный юго-западный ветер и программирование."),
    ],
)
def test_hyphens(lines: list[str], text: str, tmp_path: Path) -> None:
    assert text_of(write(tmp_path / "a.pdf", pdf(column(lines)))) == text


def test_an_initial_belongs_to_its_word(tmp_path: Path) -> None:
    initial = [(50.0, 714.0, 44.0, "O")]
    beside = column(["nce upon a time there was a mill by", "the wide river, and in it lived", "a miller."], left=86)
    assert text_of(write(tmp_path / "a.pdf", pdf([*initial, *beside]))).startswith(
        "Once upon a time there was a mill by the wide river, and in it"
    )


def test_letters_set_apart_are_words(tmp_path: Path) -> None:
    contents = b"BT /F1 12 Tf 4 Tc 50 750 Td (SPACED HEADING) Tj 0 Tc 0 -14 Td (a b c d e f) Tj ET"
    text = text_of(write(tmp_path / "a.pdf", pdf_pages([contents])))
    assert "SPACED HEADING" in text and "a b c d e f" in text


def test_the_dots_of_a_list_of_contents_are_one_sign(tmp_path: Path) -> None:
    lines = [(50.0, 750.0 - 14 * n, 12.0, f"{n} Part " + "." * 60 + f" {n}3") for n in (1, 2, 3)]
    assert text_of(write(tmp_path / "a.pdf", pdf(lines))) == "1 Part … 13\n2 Part … 23\n3 Part … 33"


def test_cells_that_stand_close_to_each_other(tmp_path: Path) -> None:
    rows = (("Country", "Capital", "People"), ("Norway", "Oslo", "5.4"), ("Canada", "Ottawa", "38.1"))
    page = [
        (left, 750.0 - 16 * y, 10.0, cell)
        for y, row in enumerate(rows)
        for left, cell in zip((50, 100, 150), row, strict=True)
    ]
    text = text_of(write(tmp_path / "a.pdf", pdf(page)))
    assert text == "Country | Capital | People\nNorway | Oslo | 5.4\nCanada | Ottawa | 38.1"


def test_code_is_indented_by_its_own_letters(tmp_path: Path) -> None:
    lines = ["если готово:", "    печать(один)", "    если нет:", "        печать(два)", "конец()"]
    page = [
        (50.0 + 7.2 * (len(line) - len(line.lstrip())), 750.0 - 14 * n, 12.0, line.lstrip())
        for n, line in enumerate(lines)
    ]
    assert text_of(write(tmp_path / "a.pdf", pdf(page))) == "\n".join(lines)


def test_the_sign_of_a_note_behind_a_sentence(tmp_path: Path) -> None:
    page = [(50.0, 750.0, 12.0, "It was so."), (100.0, 755.0, 7.0, "3")]
    assert text_of(write(tmp_path / "a.pdf", pdf(page))) == "It was so.[3]"


def test_a_table_in_a_column_is_read_as_rows(tmp_path: Path) -> None:
    words = [
        "The hall was swept at dawn and the",
        "windows were left open until the",
        "river rose above the lower store",
    ]
    rows = [("Machine", "Weight"), ("Kiln", "312 kg"), ("Press", "455 kg"), ("Lathe", "208 kg")]
    left = [
        *column([*words, *words], left=50, size=10),
        *[
            (x, 666.0 - 14 * y, 10.0, cell)
            for y, row in enumerate(rows)
            for x, cell in zip((50, 140), row, strict=True)
        ],
        *column([*words, *words], left=50, top=610, size=10),
    ]
    right = column([*words] * 5, left=310, size=10)
    text = text_of(write(tmp_path / "a.pdf", pdf([*left, *right])))
    assert "\n\nMachine | Weight\nKiln | 312 kg\nPress | 455 kg\nLathe | 208 kg\n\n" in text
    assert text.count("|") == 4


def test_a_table_whose_titles_of_rows_have_no_title(tmp_path: Path) -> None:
    rows = (
        ("", "2021", "2022"),
        ("Revenue", "1,204", "1,377"),
        ("of which exports", "610", "655"),
        ("Profit", "2", "3"),
    )
    page = [
        (left, 750.0 - 14 * y, 10.0, cell)
        for y, row in enumerate(rows)
        for left, cell in zip((50, 200, 280), row, strict=True)
        if cell
    ]
    text = text_of(write(tmp_path / "a.pdf", pdf(page)))
    assert text.strip() == "| 2021 | 2022\nRevenue | 1,204 | 1,377\nof which exports | 610 | 655\nProfit | 2 | 3"


def test_a_short_verse_keeps_its_lines(tmp_path: Path) -> None:
    lines = [
        "The river runs beneath the hill,",
        "It turns the wheel, it turns the mill,",
        "And when the summer sun is high",
    ]
    assert text_of(write(tmp_path / "a.pdf", pdf(column(lines)))) == "\n".join(lines)


def test_a_running_head_of_which_one_number_counts_the_pages(tmp_path: Path) -> None:
    words = ["The hall was swept at dawn, and the", "windows were left open until the", "river rose above the store."]
    pages = [[(50.0, 800.0, 9.0, f"J. Hydrol. 14 (1931) {211 + n}"), *column(words)] for n in range(4)]
    path = write(tmp_path / "a.pdf", pdf(*pages))
    assert "Hydrol" not in text_of(path) and "running head" in report_of(path).left_out[0]
