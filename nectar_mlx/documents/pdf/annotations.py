"""What lies on a PDF page beside its contents: filled fields of forms, typed texts, comments."""

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nectar_mlx.documents.pdf.glyphs import Run

if TYPE_CHECKING:
    from pypdfium2 import PdfPage

_MOST = 5000  # on a page
_MOST_CHARACTERS = 1 << 20  # on a page
_MOST_BYTES = 1 << 20  # of one text
_LETTERS = 11.0  # the height of a field's text, where there is room


def read(page: "PdfPage") -> tuple[list[Run], list[str]]:
    """The texts that are shown on the page, where they stand, and the comments on it."""
    import pypdfium2.raw as pdfium

    shown: list[Run] = []
    comments: list[str] = []
    left = _MOST_CHARACTERS
    form = page.formenv
    for number in range(min(pdfium.FPDFPage_GetAnnotCount(page), _MOST)):
        if left < 0:
            break
        annotation = pdfium.FPDFPage_GetAnnot(page, number)
        if not annotation:
            continue
        try:
            kind = pdfium.FPDFAnnot_GetSubtype(annotation)
            if kind in (pdfium.FPDF_ANNOT_LINK, pdfium.FPDF_ANNOT_POPUP):
                continue
            text = _field(annotation, form) if kind == pdfium.FPDF_ANNOT_WIDGET else _contents(annotation)
            left -= len(text)
            if kind in (pdfium.FPDF_ANNOT_WIDGET, pdfium.FPDF_ANNOT_FREETEXT):
                shown += _placed(annotation, text)
            elif text.strip():
                comments.append(" ".join(text.split()))
        finally:
            pdfium.FPDFPage_CloseAnnot(annotation)
    return shown, comments


def _field(annotation: Any, form: Any) -> str:
    """What a field of a form holds, as it is shown."""
    import pypdfium2.raw as pdfium

    if not form:
        return _text(lambda *room: pdfium.FPDFAnnot_GetStringValue(annotation, b"V", *room))
    kind = pdfium.FPDFAnnot_GetFormFieldType(form, annotation)
    if kind in (pdfium.FPDF_FORMFIELD_CHECKBOX, pdfium.FPDF_FORMFIELD_RADIOBUTTON):
        return "☒" if pdfium.FPDFAnnot_IsChecked(form, annotation) else "☐"
    if kind == pdfium.FPDF_FORMFIELD_PUSHBUTTON:
        return ""
    return _text(lambda *room: pdfium.FPDFAnnot_GetFormFieldValue(form, annotation, *room))


def _contents(annotation: Any) -> str:
    import pypdfium2.raw as pdfium

    return _text(lambda *room: pdfium.FPDFAnnot_GetStringValue(annotation, b"Contents", *room))


def _text(read: Callable[..., int]) -> str:
    """A text that pdfium writes into a buffer, of which it tells the size."""
    import pypdfium2.raw as pdfium

    size = min(read(None, 0), _MOST_BYTES)
    if size < 4:  # two bytes end it
        return ""
    buffer = ctypes.create_string_buffer(size)
    read(ctypes.cast(buffer, ctypes.POINTER(pdfium.FPDF_WCHAR)), size)
    return buffer.raw[: size - 2].decode("utf-16-le", "replace")


def _placed(annotation: Any, text: str) -> list[Run]:
    """The lines of a text at the place of its box."""
    import pypdfium2.raw as pdfium

    box = pdfium.FS_RECTF()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not pdfium.FPDFAnnot_GetRect(annotation, box):
        return []
    size = max(1.0, min(_LETTERS, (box.top - box.bottom) / len(lines)))
    first = (box.top + box.bottom) / 2 + size * (len(lines) / 2 - 0.5)
    rights = [min(box.right, box.left + 0.5 * size * len(line)) for line in lines]
    return [
        Run(line, box.left, middle - size / 2, right, middle + size / 2, 1 << 30)
        for line, right, middle in zip(lines, rights, (first - 1.2 * size * n for n in range(len(lines))), strict=True)
    ]
