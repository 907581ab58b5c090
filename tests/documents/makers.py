"""Makers of files for the tests, byte by byte: what is in them is known exactly."""

import io
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from nectar_mlx import NectarError, documents

Text = tuple[float, float, float, str]
"""Where a text stands on a page, from the left and from below; its size; the text."""


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zipped(members: Mapping[str, str | bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return data.getvalue()


def pdf_file(objects: Sequence[bytes]) -> bytes:
    """A PDF of these objects, numbered from 1; the first is the catalog."""
    data = bytearray(b"%PDF-1.7\n")
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % place for place in places)
    data += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(data)


def stream(data: bytes, entries: bytes = b"") -> bytes:
    packed = zlib.compress(data)
    head = b"<< /Length %d /Filter /FlateDecode %b >>" % (len(packed), entries)
    return head + b"\nstream\n" + packed + b"\nendstream"


def pdf_pages(contents: Sequence[bytes], *, size: tuple[int, int] = (595, 842), rotate: int = 0) -> bytes:
    """A PDF whose pages have these contents; /F1 is Helvetica, /F2 shows any character, /I is a picture."""
    kids = b" ".join(b"%d 0 R" % (8 + 2 * number) for number in range(len(contents)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%b] >>" % (len(contents), kids),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Type /Font /Subtype /Type0 /BaseFont /Any /Encoding /Identity-H "
        b"/DescendantFonts [5 0 R] /ToUnicode 6 0 R >>",
        b"<< /Type /Font /Subtype /CIDFontType2 /BaseFont /Any /DW 600 /CIDSystemInfo << /Registry (Adobe) "
        b"/Ordering (Identity) /Supplement 0 >> /FontDescriptor << /Type /FontDescriptor /FontName /Any /Flags 4 "
        b"/Ascent 800 /Descent -200 /CapHeight 700 /ItalicAngle 0 /StemV 80 /FontBBox [0 -200 600 800] >> >>",
        stream(
            b"/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /U def /CMapType 2 def\n"
            b"1 begincodespacerange <0000> <FFFF> endcodespacerange\n"
            b"1 beginbfrange <0000> <FFFF> <0000> endbfrange endcmap end end"
        ),
        stream(
            bytes(64), b"/Type /XObject /Subtype /Image /Width 8 /Height 8 /ColorSpace /DeviceGray /BitsPerComponent 8"
        ),
    ]
    for content in contents:
        number = len(objects) + 2
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %d %d] /Rotate %d /Contents %d 0 R /Resources "
            b"<< /Font << /F1 3 0 R /F2 4 0 R >> /XObject << /I 7 0 R >> >> >>" % (*size, rotate, number)
        )
        objects.append(stream(content))
    return pdf_file(objects)


def shown(texts: Iterable[Text]) -> bytes:
    """The contents of a page with these texts; those outside of Latin are shown in the font for any character."""
    parts = []
    for left, bottom, size, text in texts:
        try:
            latin = text.encode("cp1252").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")
            font, string = b"/F1", b"(%b)" % latin
        except UnicodeEncodeError:
            font, string = b"/F2", b"<%b>" % text.encode("utf-16-be").hex().encode()
        parts.append(b"BT %b %g Tf %g %g Td %b Tj ET\n" % (font, size, left, bottom, string))
    return b"".join(parts)


def pdf(*pages: Iterable[Text], size: tuple[int, int] = (595, 842)) -> bytes:
    return pdf_pages([shown(page) for page in pages], size=size)


def column(lines: Iterable[str], *, left: float = 50, top: float = 750, size: float = 12) -> list[Text]:
    """Lines one below the other."""
    return [(left, top - 14 * number, size, line) for number, line in enumerate(lines)]


FOX = "The quick brown fox jumps over the lazy dog."


def text_of(path: Path) -> str:
    """The text of one file."""
    return documents.read([path]).text


def report_of(path: Path) -> documents.FileReport:
    """What is said about one file."""
    return documents.read([path]).files[0]


def refusal(*paths: str | Path) -> str:
    """The line with which files are refused."""
    with pytest.raises(NectarError) as error:
        documents.read(paths)
    assert "\n" not in str(error.value)
    return str(error.value)
