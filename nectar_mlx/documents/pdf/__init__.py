"""PDF files: text in the order of reading, with a place for each page; pages without text are named."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from nectar_mlx.documents import ocr
from nectar_mlx.documents.pdf import annotations, flow, layout, margins
from nectar_mlx.documents.pdf.glyphs import runs
from nectar_mlx.documents.pdf.layout import Line
from nectar_mlx.documents.reading import Document, Place, Unreadable

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument, PdfPage

MOST_PAGES = 20_000
MOST_CHARACTERS = 1 << 26
_MOST_ATTACHMENTS = 100  # that are named
_IMAGE, _FORM = 3, 5
_OBJECT = re.compile(rb"(\d{1,10}) (\d{1,5}) obj\b")
_REGIONS = 1 << 20  # more than one page has columns


def _nothing(number: int) -> None:
    pass


page_read: Callable[[int], None] = _nothing
"""Called after each page with its number: a sign of life."""


def read_pdf(data: bytes, name: str) -> Document:
    """A PDF file; pages that are pictures are read by text recognition where there is one, and else named."""
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise Unreadable("the PDF is encrypted; save a copy without its password") from error
        pdf = _rebuilt(data)
    try:
        with suppress(pypdfium2.PdfiumError):  # a damaged form costs no page
            pdf.init_forms()
        return _document(pdf)
    finally:
        pdf.close()


def _rebuilt(data: bytes) -> "PdfDocument":
    """A file whose end is lost: where its catalog is known, the objects can be found."""
    import pypdfium2

    found = [match for match in _OBJECT.finditer(data) if b"/Catalog" in data[match.end() : match.end() + 500]]
    if not found:
        raise Unreadable("a damaged PDF")
    root = b" ".join([found[-1][1], found[-1][2], b"R"])
    try:
        return pypdfium2.PdfDocument(data + b"\ntrailer\n<< /Root " + root + b" >>\nstartxref\n0\n%%EOF\n")
    except pypdfium2.PdfiumError as error:
        raise Unreadable("a damaged PDF") from error


def _document(pdf: "PdfDocument") -> Document:
    pages = _Pages()
    count = len(pdf)
    for number in range(1, min(count, MOST_PAGES) + 1):
        pages.read(pdf, number)
        page_read(number)
        if pages.characters > MOST_CHARACTERS:
            raise Unreadable(f"more than {MOST_CHARACTERS:,} characters")
    kept, left_out = margins.removed(pages.lines)
    text, bounds = flow.join(kept)
    places = [Place("page", str(number), start, end) for number, (start, end) in enumerate(bounds, 1)]
    left_out = pages.left_out() + left_out
    if count > MOST_PAGES:
        left_out.append(f"pages after the first {MOST_PAGES:,}")
    left_out += _attachments(pdf)
    if not text.strip() and pages.pictures:
        missing = "" if ocr.available() else f": {ocr.advice()}"
        raise Unreadable(f"the PDF holds no text, only pictures of it, and needs text recognition (OCR){missing}")
    return Document("pdf", text, places, left_out)


def _attachments(pdf: "PdfDocument") -> list[str]:
    import pypdfium2

    found = []
    for place in range(min(pdf.count_attachments(), _MOST_ATTACHMENTS)):
        with suppress(pypdfium2.PdfiumError, UnicodeError):
            found.append(f"attachment {' '.join(pdf.get_attachment(place).get_name()[:200].split())}")
    return found


class _Pages:
    """The lines of each page, and which pages could not be read or only in part."""

    def __init__(self) -> None:
        self.lines: list[list[Line]] = []
        self.pictures: list[int] = []
        self.characters = 0
        self._recognized: list[int] = []
        self._damaged: list[int] = []
        self._garbled: list[int] = []
        self._cut: list[int] = []

    def read(self, pdf: "PdfDocument", number: int) -> None:
        import pypdfium2

        lines: list[Line] = []
        try:
            page = pdf[number - 1]
            try:
                lines = self._lines(page, number)
            finally:
                page.close()
        except pypdfium2.PdfiumError:
            self._damaged.append(number)
        self.characters += sum(len(line.text) for line in lines)
        self.lines.append(lines)

    def _lines(self, page: "PdfPage", number: int) -> list[Line]:
        sides, is_cut = runs(page)
        if is_cut:
            self._cut.append(number)
        filled, comments = annotations.read(page)
        if filled:
            sides[:1] = [[*sides[0], *filled] if sides else filled]
        lines: list[Line] = []
        for side in sides:
            lines += layout.lines(side, first_region=lines[-1].region + 1 if lines else number * _REGIONS)
        for comment in comments:
            region = lines[-1].region + 1 if lines else number * _REGIONS
            lines.append(Line(f"Comment: {comment}", 0.0, 0.0, 5.0 * len(comment), 10.0, region))
        text = "".join(line.text for line in lines)
        if len(text) < 50 and _has_picture(page, covers=0.0 if not text else 0.4):
            recognized = ocr.recognize(page)
            (self._recognized if recognized else self.pictures).append(number)
            lines += recognized
        elif _is_garbled(text):
            self._garbled.append(number)
        return lines

    def left_out(self) -> list[str]:
        notes = [
            (self.pictures, f"only a picture, without text (no text recognition is installed: {ocr.advice()})"),
            (self._damaged, "damaged"),
            (self._garbled, "a font that does not say which letters it shows"),
            (self._cut, "text after the first part of a very full page"),
        ]
        return [f"{_numbers(numbers)}: {what}" for numbers, what in notes if numbers]


def _has_picture(page: "PdfPage", *, covers: float) -> bool:
    """Whether pictures, or pictures in forms, take more than this share of the page; drawn lines count as one."""
    width, height = page.get_size()
    area = 0.0
    for drawn in page.get_objects(filter=(_IMAGE, _FORM), max_depth=3):
        left, bottom, right, top = drawn.get_bounds()
        area += abs((right - left) * (top - bottom))
    return bool(area > covers * width * height)


def _is_garbled(text: str) -> bool:
    unknown = sum(character == "\ufffd" or "\ue000" <= character <= "\uf8ff" for character in text)
    return unknown > 0.3 * max(1, len(text))


def _numbers(numbers: Sequence[int]) -> str:
    """Page numbers in words: "page 3", "pages 2, 5–7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in ranges)
    return f"page{'s' * (len(numbers) > 1)} {shown}"
