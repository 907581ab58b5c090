"""The glyphs of a PDF page as runs: pieces of text with their boxes, as pdfium finds them."""

from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING

from nectar_mlx.documents.pdf.direction import is_right_to_left

if TYPE_CHECKING:
    from pypdfium2 import PdfPage

MOST_GLYPHS = 200_000  # on one page; a dense page of a telephone book has 20 000
_HYPHENS = ("\ufffe", "\x02")  # pdfium's signs for a hyphen at the end of a line
_FEWEST_APART = 4  # letters
_SPACES = " \t\u00a0"
_GUESSED = -1  # the order of a space that pdfium sees between glyphs, and the file does not hold


@dataclass(slots=True)
class Run:
    """Text on one baseline without a wide gap in it; `top` is above `bottom`."""

    text: str
    left: float
    bottom: float
    right: float
    top: float
    order: int = 0

    @property
    def size(self) -> float:
        return self.top - self.bottom

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2


def runs(page: "PdfPage") -> tuple[list[list[Run]], bool]:
    """The runs of a page in the order of its contents, and whether the page has more than are read.

    Text of another direction, turned upright, is a list of its own; the direction of most comes first.
    """
    glyphs, is_cut = _glyphs(page)
    sides = sorted(glyphs.values(), key=len, reverse=True)
    return [_runs(side) for side in sides], is_cut


def _runs(glyphs: list[Run]) -> list[Run]:
    found: list[Run] = []
    run: list[Run] = []
    spaces, is_guessed = 0, False
    for glyph in glyphs:
        if glyph.text in _SPACES:
            spaces, is_guessed = spaces + 1, glyph.order == _GUESSED
            continue
        if run and not _follows(run[-1], glyph, spaces, is_guessed=is_guessed):
            found.append(_united(run, len(found)))
            run = []
        elif run and spaces:
            run.append(Run(" ", run[-1].right, glyph.bottom, glyph.left, glyph.top))
        run.append(glyph)
        spaces = 0
    if run:
        found.append(_united(run, len(found)))
    return _together(found)


def _follows(last: Run, glyph: Run, spaces: int, *, is_guessed: bool) -> bool:
    """Whether a glyph continues the run that ends in `last`; `is_guessed` if the file has no space between them."""
    height, size = max(last.size, glyph.size), min(last.size, glyph.size)
    if abs(last.bottom - glyph.bottom) > 0.25 * height or size < 0.75 * height:
        return False
    gap = glyph.left - last.right
    if is_right_to_left(last.text) or is_right_to_left(glyph.text):
        return abs(gap) < 0.2 * size and not spaces
    widest = 0.15 if not spaces else 0.9 if is_guessed else 1.4 if spaces < 3 else 0.8
    return -0.5 * size < gap < widest * size


def _united(glyphs: list[Run], order: int) -> Run:
    return Run(
        "".join(glyph.text for glyph in glyphs),
        min(glyph.left for glyph in glyphs),
        min(glyph.bottom for glyph in glyphs),
        max(glyph.right for glyph in glyphs),
        max(glyph.top for glyph in glyphs),
        order,
    )


def _together(runs: list[Run]) -> list[Run]:
    """The runs, those of a word whose letters stand apart, as in some headings, as one."""
    found: list[Run] = []
    word: list[Run] = []
    for run in [*runs, None]:
        if run is not None and word and _is_next_letter(word[-1], run):
            word.append(run)
            continue
        found += [_united(word, len(found))] if len(word) >= _FEWEST_APART else word
        word = [run] if run is not None else []
    for order, run in enumerate(found):
        run.order = order
    return found


def _is_next_letter(last: Run, run: Run) -> bool:
    is_level = abs(last.bottom - run.bottom) < 0.1 * last.size and abs(last.size - run.size) < 0.1 * last.size
    is_single = all(len(letter) == 1 and letter.isalpha() for part in (last, run) for letter in part.text.split())
    return is_level and is_single and 0.1 * run.size < run.left - last.right < 0.6 * run.size


def _glyphs(page: "PdfPage") -> tuple[dict[int, list[Run]], bool]:
    """The glyphs by the quarter turn of their text, and whether there are more than are read."""
    import pypdfium2.raw as pdfium

    text_page = page.get_textpage()
    try:
        count = pdfium.FPDFText_CountChars(text_page)
        box = pdfium.FS_RECTF()
        glyphs: dict[int, list[Run]] = {}
        high = 0
        for number in range(min(count, MOST_GLYPHS)):
            code = pdfium.FPDFText_GetUnicode(text_page, number)
            if 0xD800 <= code < 0xDC00:  # the first half of a character
                high = code
                continue
            if 0xDC00 <= code < 0xE000:
                code = 0x10000 + ((high - 0xD800) << 10) + code - 0xDC00 if high else 0xFFFD
            high = 0
            if code in (0, 10, 13) or not pdfium.FPDFText_GetLooseCharBox(text_page, number, box):
                continue
            character = "-" if chr(code) in _HYPHENS else chr(code)
            order = _GUESSED if character == " " and pdfium.FPDFText_IsGenerated(text_page, number) == 1 else 0
            turn = round(pdfium.FPDFText_GetCharAngle(text_page, number) / (pi / 2)) % 4
            glyph = _upright(character, box.left, box.bottom, box.right, box.top, turn)
            glyph.order = order
            glyphs.setdefault(turn, []).append(glyph)
    finally:
        text_page.close()
    return glyphs, count > MOST_GLYPHS


def _upright(text: str, left: float, bottom: float, right: float, top: float, turn: int) -> Run:
    """A glyph as it lies when the page is turned so that its text can be read."""
    if turn == 0:
        return Run(text, left, bottom, right, top)
    if turn == 1:
        return Run(text, -top, left, -bottom, right)
    if turn == 2:
        return Run(text, -right, -top, -left, -bottom)
    return Run(text, bottom, -right, top, -left)
