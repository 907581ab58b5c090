"""Text recognition on pages that are pictures: macOS's own, or the program `tesseract` where it is installed."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from nectar_mlx.core import extras
from nectar_mlx.documents.pdf.layout import Line
from nectar_mlx.documents.reading import Document, Unreadable

if TYPE_CHECKING:
    from pypdfium2 import PdfPage

_DOTS_PER_POINT = 300 / 72
_MOST_DOTS = 40_000_000
_SECONDS = 120  # for one page


@lru_cache
def available() -> str:
    """Which recognition there is on this machine: "vision", "tesseract" or none."""
    if sys.platform == "darwin" and importlib.util.find_spec("ocrmac"):
        return "vision"
    return "tesseract" if shutil.which("tesseract") else ""


def advice() -> str:
    """What installs it."""
    if sys.platform == "darwin":
        return extras.install("ocr")
    return "install tesseract: the package tesseract-ocr of Debian and Ubuntu, tesseract of Fedora"


def read_picture(data: bytes, name: str) -> Document:
    """The text in a picture, such as a scanned letter."""
    which = available()
    if not which:
        raise Unreadable(f"a picture, and no text recognition is installed: {advice()}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"picture{Path(name).suffix.lower()}")
        path.write_bytes(data)
        try:
            lines = _vision(path) if which == "vision" else _tesseract(path)
        except Exception as error:  # whatever the recognition, or what opens pictures for it, raises
            raise Unreadable("a picture that text recognition cannot open") from error
    if not lines:
        raise Unreadable("a picture in which no text was recognized")
    return Document("picture", "\n".join(lines))


def recognize(page: "PdfPage") -> list[Line]:
    """The lines of a page's picture, from top to bottom; none where there is no recognition."""
    which = available()
    if not which:
        return []
    width, height = page.get_size()
    scale = min(_DOTS_PER_POINT, (_MOST_DOTS / max(1.0, width * height)) ** 0.5)
    bitmap = page.render(scale=scale, grayscale=True)
    with tempfile.TemporaryDirectory() as folder:
        if which == "vision":
            path = Path(folder, "page.png")
            bitmap.to_pil().save(path)
            texts = _vision(path)
        else:
            path = Path(folder, "page.pgm")
            rows = bitmap.to_numpy().reshape(bitmap.height, -1)[:, : bitmap.width]
            path.write_bytes(b"P5 %d %d 255\n" % (bitmap.width, bitmap.height) + rows.tobytes())
            texts = _tesseract(path)
    # Where the lines stand is not kept, only how long they are.
    return [Line(text, 0.0, -14.0 * place, 5.0 * len(text), 10.0 - 14.0 * place) for place, text in enumerate(texts)]


def _vision(path: Path) -> list[str]:
    from ocrmac import ocrmac

    found = ocrmac.OCR(str(path)).recognize()
    # A box is (left, bottom, width, height) in shares of the picture.
    found = sorted(found, key=lambda item: (-round(item[2][1] + item[2][3], 2), item[2][0]))
    return [text for text, _, _ in found if text.strip()]


def _tesseract(path: Path) -> list[str]:
    try:
        done = subprocess.run(["tesseract", str(path), "-"], capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
