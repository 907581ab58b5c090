"""PDF files: the order of reading, paragraphs, columns, tables, and pages that are pictures."""

import os
import sys
import time
import zlib
from pathlib import Path

import psutil
import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nectar_mlx import documents
from nectar_mlx.documents import ocr, worker
from nectar_mlx.documents.formats import parse
from nectar_mlx.documents.reading import Document, Unreadable
from tests.documents.makers import (
    FOX,
    Text,
    column,
    pdf,
    pdf_file,
    pdf_pages,
    refusal,
    shown,
    stream,
    text_of,
    write,
)

ROOT = Path(__file__).parents[2]
PICTURE = b"q 500 0 0 700 40 60 cm /I Do Q"


@pytest.fixture(autouse=True)
def no_recognition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "available", lambda: "")


def read(*pages: list[Text]) -> Document:
    return parse(pdf(*pages), "a.pdf")


def lines(*texts: str) -> str:
    """The text of a page that holds these lines."""
    return read(column(texts)).text


class TestHyphens:
    @pytest.mark.parametrize(
        ("before", "after", "joined"),
        [
            ("The travellers crossed the moun-", "tains at dawn.", "The travellers crossed the mountains at dawn."),
            ("It is a well-", "known fact.", "It is a well-known fact."),
            ("This is state-of-the-", "art work.", "This is state-of-the-art work."),
            ("It was the 19-", "th century.", "It was the 19-th century."),
            ("See https://ex.org/a-", "b for more.", "See https://ex.org/a-b for more."),
            ("See the pages 12-", "14.", "See the pages 12-14."),
            ("He sent an e-", "mail to her.", "He sent an e-mail to her."),
            ("The Nord-", "Ostsee canal.", "The Nord-Ostsee canal."),
            ("A chapter on INTRO-", "DUCTION to it.", "A chapter on INTRODUCTION to it."),
            ("His mother-", "in-law came.", "His mother-in-law came."),
            ("There were twenty-", "one of them.", "There were twenty-one of them."),
            ("She liked the govern\u2010", "ment.", "She liked the government."),
            ("She liked the govern\u00ad", "ment.", "She liked the government."),
            ("Уже никто не пом-", "нит.", "Уже никто не помнит."),
            ("Она говорит по-", "русски.", "Она говорит по-русски."),
            ("Это был кто-", "то.", "Это был кто-то."),
            ("Die Wahr-", "heit ist gross.", "Die Wahrheit ist gross."),
            ("Une ques-", "tion d'or.", "Une question d'or."),
        ],
    )
    def test_a_broken_word(self, before: str, after: str, joined: str) -> None:
        assert lines(before, after) == joined

    def test_the_document_shows_how_it_writes_a_word(self) -> None:
        assert "uses on-line tools" in lines("He now uses on-", "line tools, and an on-line shop is what he runs.")
        assert "uses online tools" in lines("He now uses on-", "line tools, and an online shop is what he runs.")

    def test_a_word_goes_on_over_pages_and_columns(self) -> None:
        document = read(column(["The travellers crossed the moun-"]), column(["tains at dawn."]))
        assert document.text == "The travellers crossed the mountains at dawn."
        assert [(place.start, place.end) for place in document.places] == [(0, 31), (31, 45)]

    def test_a_sentence_goes_on_over_pages(self) -> None:
        first = [
            "It was a long day and the rain did not stop until the evening",
            "came, and then the whole village went out to look at what was",
        ]
        second = ["left of the old bridge over the river.", "Then all went home."]
        right = "to look at what was left of the old bridge over the river.\nThen all went home."
        assert read(column(first), column(second)).text.endswith(right)

    def test_a_dash_is_no_hyphen(self) -> None:
        assert lines("He came -", "and went.") == "He came - and went."


class TestLines:
    def test_that_the_width_broke_are_joined(self) -> None:
        text = lines(
            "The house stands on a hill above the town and has a garden with",
            "many old trees, which the owner likes more than the house it-",
            "self. He is old.",
            "Another paragraph starts on its own line.",
        )
        assert text == (
            "The house stands on a hill above the town and has a garden with many old trees, which the owner likes "
            "more than the house itself. He is old.\nAnother paragraph starts on its own line."
        )

    @pytest.mark.parametrize(
        "kept",
        [
            ("Shopping list", "apples", "bananas", "cheese", "Then:", "import os", "for x in range(3):"),
            ("two red apples", "three bananas", "cheese and butter", "a box of eggs", "milk"),
            ("Herr Max Mueller", "Musterstrasse 12", "12345 Bonn"),
            ("Shall I compare thee to a day", "Thou art more lovely and mild", "Rough winds do shake the buds",
             "And summer has too short a date", "Some time too hot the eye shines"),
            ("The following things:", "- apples", "- pears and other fruit", "1. one", "2) two"),
        ],
    )  # fmt: skip
    def test_of_lists_code_and_verse_are_kept(self, kept: tuple[str, ...]) -> None:
        assert lines(*kept) == "\n".join(kept)

    def test_code_keeps_its_indentation(self) -> None:
        page = [
            *column(["import os", "for x in range(3):"]),
            (63.3, 722.0, 12.0, "print(x)"),
            *column(["end()"], top=708),
        ]
        assert read(page).text == "import os\nfor x in range(3):\n    print(x)\nend()"

    def test_an_indented_line_starts_a_paragraph(self) -> None:
        first = ["The first paragraph fills the whole of this line with words and", "this whole second line too, so"]
        page = [*column(first), (62.0, 722.0, 12.0, "Another one is indented.")]
        assert read(page).text.endswith("too, so\nAnother one is indented.")

    def test_a_gap_starts_a_paragraph(self) -> None:
        page = [*column(["One line.", "Two lines."]), *column(["After a gap."], top=690)]
        assert read(page).text == "One line.\nTwo lines.\n\nAfter a gap."

    def test_chinese_lines_are_joined_without_spaces(self) -> None:
        assert lines("这是一个普通的中文句子用旧的编码保存天气很好今天", "我们去公园看花了然后回家。") == (
            "这是一个普通的中文句子用旧的编码保存天气很好今天我们去公园看花了然后回家。"
        )

    def test_sentences_of_other_scripts(self) -> None:
        text = lines(
            "Глава первая. Было раннее утро,",
            "и город ещё спал.",
            "Иван вышел из дома и пошёл к",
            "реке.",
            "Глава вторая.",
        )
        assert text == (
            "Глава первая. Было раннее утро, и город ещё спал.\nИван вышел из дома и пошёл к реке.\nГлава вторая."
        )

    def test_right_to_left(self) -> None:
        page = column(["שלום עולם זה טקסט ארוך מאוד"[::-1], "שורה שנייה."[::-1]])
        assert read(page).text == "שלום עולם זה טקסט ארוך מאוד שורה שנייה."

    def test_numbers_and_brackets_in_right_to_left_lines(self) -> None:
        left = "שלום"[::-1]
        assert read([(50, 700, 12, f"123 {left}")]).text == "שלום 123"
        assert read([(50, 700, 12, f"({left}) {left}")]).text == "שלום (שלום)"
        assert read([(50, 700, 12, f"The word {left} is Hebrew")]).text == "The word שלום is Hebrew"

    def test_a_heading_is_marked(self) -> None:
        page = [(50.0, 780.0, 20.0, "The House"), *column([FOX, FOX], top=740)]
        assert read(page).text.startswith("# The House\n\nThe quick")

    def test_a_raised_number_keeps_its_sense(self) -> None:
        assert read([(50, 700, 12, "10"), (63.4, 706, 7, "6"), (70, 700, 12, "metres")]).text == "10^6 metres"


LEFT = ["The left column talks about", "apples and pears and the", "way they are grown in the", "north of the country."]
RIGHT = ["The right column is about", "rivers and lakes and the", "fish that live in them and", "how they are caught."]
COLUMNS = (
    "The left column talks about apples and pears and the way they are grown in the north of the country.\n\n"
    "The right column is about rivers and lakes and the fish that live in them and how they are caught."
)


class TestColumns:
    @pytest.mark.parametrize("lower", [0, 3, 7])
    def test_row_by_row(self, lower: float) -> None:
        pairs = zip(column(LEFT), column(RIGHT, left=300, top=750 - lower), strict=True)
        assert read([text for pair in pairs for text in pair]).text == COLUMNS

    def test_one_after_the_other(self) -> None:
        assert read([*column(LEFT), *column(RIGHT, left=300)]).text == COLUMNS

    def test_below_a_title_and_above_a_line(self) -> None:
        page = [
            (50.0, 790.0, 12.0, "A line above the columns that is as wide as both of them are together, and more."),
            *(text for pair in zip(column(LEFT), column(RIGHT, left=300), strict=True) for text in pair),
            (50.0, 660.0, 12.0, "A line below the columns that is as wide as both of them are together, and more."),
        ]
        assert COLUMNS in read(page).text
        assert read(page).text.startswith("A line above") and read(page).text.endswith("and more.")

    def test_from_the_right(self) -> None:
        one, other = "זה טור ימין של הדף"[::-1], "זה טור שמאל של הדף"[::-1]
        page = [*column([other] * 3), *column([one] * 3, left=300)]
        assert read(page).text.startswith("זה טור ימין")


class TestTables:
    def test_are_rows(self) -> None:
        table = [("Item", "Cost", "Year"), ("Roof", "1200", "2019"), ("Walls and doors", "3400", "2020")]
        page = [
            (50.0 + 150 * x, 700.0 - 16 * y, 11.0, cell) for y, row in enumerate(table) for x, cell in enumerate(row)
        ]
        right = "Item | Cost | Year\nRoof | 1200 | 2019\nWalls and doors | 3400 | 2020"
        assert read(page).text == right
        by_column = sorted(page)
        assert read(by_column).text == right
        around = [*column([FOX + " " + FOX], top=730), *page, *column([FOX + " " + FOX], top=620)]
        assert read(around).text == f"{FOX} {FOX}\n\n{right}\n\n{FOX} {FOX}"

    def test_cells_set_with_spaces(self) -> None:
        page = column(["Item        Cost", "Roof        1200", "Wall          90"])
        assert read(page).text == "Item | Cost\nRoof | 1200\nWall | 90"

    def test_empty_and_long_cells(self) -> None:
        page = [(50, 700, 11, "Oak"), (150, 700, 11, "A tree that grows slowly and lives"), (400, 700, 11, "12"),
                (150, 687, 11, "for many hundred years"),
                (50, 670, 11, "Birch"), (400, 670, 11, "7")]  # fmt: skip
        assert read(page).text == ("Oak | A tree that grows slowly and lives for many hundred years | 12\nBirch |  | 7")


BODIES = [
    ["The rain fell all day.", "No one came to the house.", "Then it was night."],
    ["A dog barked far away.", "She lit the lamp and read.", "The wind had gone."],
    ["Morning was grey and cold.", "He walked to the town.", "Shops were still shut."],
    ["Nobody spoke at the table.", "A letter lay between them.", "It had no name on it."],
]


class TestMargins:
    @pytest.mark.parametrize("top", [800, 764])
    @pytest.mark.parametrize("head", ["Annual Report 2023", "Acme Ltd - Confidential"])
    def test_running_heads_and_page_numbers_are_left_out(self, head: str, top: float) -> None:
        pages = [
            [(50.0, top, 12.0, head), *column(body), (290.0, 40.0, 12.0, str(number))]
            for number, body in enumerate(BODIES, 1)
        ]
        document = read(*pages)
        assert document.text == "\n\n".join("\n".join(body) for body in BODIES)
        assert document.left_out == [f"running head “{head}” (on 4 pages)", "page numbers (on 4 pages)"]

    def test_a_head_with_the_number_of_the_page(self) -> None:
        pages = [[(50.0, 800.0, 9.0, f"Acme {n}"), *column(body)] for n, body in enumerate(BODIES, 7)]
        document = read(*pages)
        assert "Acme" not in document.text and document.left_out == ["page numbers (on 4 pages)"]

    def test_heads_of_two_pages(self) -> None:
        pages = [[(50.0, 800.0, 9.0, "Acme Ltd"), *column(body)] for body in BODIES[:2]]
        assert read(*pages).left_out == ["running head “Acme Ltd” (on 2 pages)"]

    def test_heads_close_to_the_text(self) -> None:
        pages = [column(["Acme Ltd - Confidential", *body, str(n)]) for n, body in enumerate(BODIES[:2], 1)]
        assert read(*pages).text == "\n\n".join("\n".join(body) for body in BODIES[:2])
        short = [column(["Acme Ltd", body[0]]) for body in BODIES]
        assert "Acme" not in read(*short).text

    @pytest.mark.parametrize("form", ["{}", "- {} -", "Page {} of 9", "Seite {}", "{}/9", "第 {} 页"])
    def test_forms_of_page_numbers(self, form: str) -> None:
        pages = [[*column(body), (290.0, 40.0, 9.0, form.format(n))] for n, body in enumerate(BODIES, 4)]
        assert read(*pages).left_out == ["page numbers (on 4 pages)"]

    def test_roman_page_numbers(self) -> None:
        numbers = ("viii", "ix", "x", "xi")
        pages = [[*column(body), (290.0, 40.0, 9.0, n)] for n, body in zip(numbers, BODIES, strict=True)]
        assert read(*pages).left_out == ["page numbers (on 4 pages)"]

    def test_what_differs_is_kept(self) -> None:
        pages = [column([f"Fact {n}: the code is {4711 + n}.", f"Its name is {n}.", "It is so."]) for n in (1, 2, 3)]
        assert all(f"Fact {n}: the code is {4711 + n}." in read(*pages).text for n in (1, 2, 3))
        alone = [column([f"{FOX} {n}"]) for n in (1, 2, 3)]
        assert read(*alone).text.count(FOX) == 3
        numbers = [column(["Prices", "of", "things", str(n)]) for n in (12, 700, 31)]
        assert "700" in read(*numbers).text


class TestPages:
    def test_places(self) -> None:
        document = read(column(["One."]), [], column(["Three."]))
        assert document.text == "One.\n\nThree."
        assert [(place.unit, place.name, document.text[place.start : place.end]) for place in document.places] == [
            ("page", "1", "One."),
            ("page", "2", ""),
            ("page", "3", "Three."),
        ]

    def test_pictures_are_named(self, tmp_path: Path) -> None:
        text = shown(column([FOX]))
        document = parse(pdf_pages([text, PICTURE, text, PICTURE, PICTURE, b""]), "a.pdf")
        (left_out,) = document.left_out
        assert left_out.startswith("pages 2, 4–5: only a picture, without text (no text recognition is installed")
        with pytest.raises(Unreadable, match="OCR"):
            parse(pdf_pages([PICTURE, PICTURE]), "b.pdf")
        assert "no text" in refusal(write(tmp_path / "c.pdf", pdf_pages([b""])))

    def test_a_picture_with_a_little_text_is_named(self) -> None:
        page = PICTURE + b"\n" + shown([(50, 800, 9, "Scanned by Acme")])
        document = parse(pdf_pages([page, shown(column([FOX]))]), "a.pdf")
        assert "page 1: only a picture" in str(document.left_out) and "Scanned by Acme" in document.text

    @pytest.mark.parametrize("rotate", [0, 90, 180, 270])
    def test_turned_pages(self, rotate: int) -> None:
        turned = {0: b"1 0 0 1 0 0", 90: b"0 1 -1 0 800 0", 180: b"-1 0 0 -1 595 842", 270: b"0 -1 1 0 0 800"}[rotate]
        content = b"q " + turned + b" cm " + shown(column(["First line of two.", "Second line."])) + b" Q"
        data = pdf_pages([content], size=(842, 842), rotate=rotate)
        assert parse(data, "a.pdf").text == "First line of two.\nSecond line."

    def test_is_known_by_its_first_bytes(self, tmp_path: Path) -> None:
        assert text_of(write(tmp_path / "download", pdf(column(["Some text"])))) == "Some text"

    @pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
    @pytest.mark.parametrize("password", ["", "secret"])
    def test_encryption(self, password: str, algorithm: str, tmp_path: Path) -> None:
        writer = pypdf.PdfWriter(clone_from=write(tmp_path / "plain.pdf", pdf(column(["Some text"]))))
        writer.encrypt(password, "owner", algorithm=algorithm)
        writer.write(tmp_path / "a.pdf")
        if password:
            assert "encrypted" in refusal(tmp_path / "a.pdf")
        else:
            assert text_of(tmp_path / "a.pdf") == "Some text"


class TestProcess:
    def test_forms_that_multiply_are_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker, "SECONDS", 1.0)
        write(tmp_path / "a.pdf", multiplying())
        write(tmp_path / "b.pdf", pdf(column([FOX])))
        reading = documents.read([tmp_path])
        assert reading.text == f"# b.pdf\n\n{FOX}"
        assert reading.files[0].reason == "page 1 takes more than 1 seconds to read"

    @pytest.mark.process
    def test_it_ends_with_a_program_that_is_killed(self, tmp_path: Path) -> None:
        """Nobody watches over it then."""
        code = "import sys; from nectar_mlx import documents; documents.read([sys.argv[1]])"
        path = write(tmp_path / "a.pdf", multiplying())
        program = psutil.Popen([sys.executable, "-c", code, str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
        busy = list[psutil.Process]()
        for _ in range(600):
            busy = [child for child in program.children() if child.cpu_times().user > 1.0]
            if busy:
                break
            time.sleep(0.1)
        program.kill()
        program.wait()
        gone, _ = psutil.wait_procs(busy, timeout=10)
        assert busy and gone == busy

    def test_memory_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker, "MOST_BYTES", 1 << 28)
        twice = zlib.compress(zlib.compress(bytes(1 << 29)))
        content = b"<< /Length %d /Filter [/FlateDecode /FlateDecode] >>\nstream\n%b\nendstream" % (len(twice), twice)
        objects = [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R >>",
            content,
        ]
        reason = refusal(write(tmp_path / "a.pdf", pdf_file(objects)))
        assert "of memory" in reason or "no text" in reason


def multiplying() -> bytes:
    """A page whose forms draw each other two to the power of forty times."""
    calls = [stream(b"/N Do /N Do", form(7 + level)) for level in range(40)]
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 5 0 R "
        b"/Resources << /XObject << /N 6 0 R >> >> >>",
        font,
        stream(b"/N Do"),
        *calls,
        stream(b"BT /F1 12 Tf (x) Tj ET", form(4)),
    ]
    return pdf_file(objects)


def form(number: int) -> bytes:
    resources = b"/Resources << /Font << /F1 4 0 R >> /XObject << /N %d 0 R >> >>" % number
    return b"/Type /XObject /Subtype /Form /BBox [0 0 600 800] " + resources


class TestRecognition:
    def test_tesseract_is_asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = '#!/bin/sh\nhead -c 2 "$1"\necho " was what I saw in the picture of"\necho "the page."\n'
        program = write(tmp_path / "bin" / "tesseract", script)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        monkeypatch.setattr(ocr, "available", lambda: "tesseract")
        data = pdf_pages([shown(column([FOX])), PICTURE])
        document = parse(data, "a.pdf")
        assert document.text == f"{FOX}\n\nP5 was what I saw in the picture of the page."
        assert document.left_out == []
        program.write_text("#!/bin/sh\nexit 1\n")
        assert "page 2: only a picture" in str(parse(data, "a.pdf").left_out)


class TestDamage:
    def test_is_said(self, tmp_path: Path) -> None:
        whole = pdf(column(["Some text"]))
        for data in (b"no pdf", whole[:20], b"%PDF-1.4\n" + bytes(range(256)) * 3):
            assert "damaged PDF" in refusal(write(tmp_path / "bad.pdf", data))

    @given(st.integers(0, 2000), st.binary(min_size=1, max_size=20))
    @settings(max_examples=100, deadline=None)
    def test_any_is_text_or_refused(self, start: int, damage: bytes) -> None:
        whole = pdf(column([FOX]), column([FOX]))
        try:
            parse(whole[:start] + damage + whole[start + len(damage) :], "a.pdf")
        except Unreadable as error:
            assert "\n" not in str(error)
