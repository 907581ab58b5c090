"""Seeds and readers of document formats for `fuzz_readers`.

Zip files are fuzzed as what is in them, member by member: a fuzzer would find nothing behind their checksums. So
`MARK`, a name and a line's end start each member; a file that begins as a zip file is read as it is.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from nectar_mlx import NectarError
from nectar_mlx.documents import formats
from nectar_mlx.documents.normalize import normalized, position_map
from nectar_mlx.documents.reading import Document, Unreadable
from tests.documents import makers, test_docx, test_epub

KINDS = ("docx", "epub", "pdf", "html")
MARK = b"\n=====>"
_PAGE = """<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>t</title><style>p {}</style></head><body>
<nav><a href=#>x</a></nav><h1>One</h1><p>a <b>b</b> <sup>2</sup><br>c<ruby>d<rt>e</rt></ruby> <q>f</q> &amp; &#x41;
<ul><li>g<ol start=3><li>h</ol></ul><table role=presentation><tr><td>i<table><tr><th>j<td>k</table></table>
<math><mfrac><mi>x</mi><mn>2</mn></mfrac></math><pre>
 l
</pre><div class="cookie-banner">m</div><div style="display:none">n</div><noscript>o</noscript><footer>p</footer>"""
_CHART = f"""<w:drawing><a:t xmlns:a="a">chart</a:t></w:drawing><w:txbxContent>{test_docx.paragraph("box")}
</w:txbxContent><w:footnoteReference w:id="2"/><w:pict/>"""


def seeds(kind: str) -> list[bytes]:
    """Good files; zip files as their members, and one as it is."""
    if kind == "html":
        return [_PAGE.encode(), _PAGE.replace("utf-8", "utf-16").encode("utf-16")]
    if kind == "pdf":
        content = makers.shown([*makers.column([makers.FOX, "- an item", "x ה א"]), (300, 700, 12, "beside")])
        page = b"<< /Length %d >>\nstream\n%b\nendstream" % (len(content), content)
        plain = makers.pdf_pages([content])
        return [plain, plain.replace(makers.stream(content), page), makers.pdf_pages([b"/I Do", content], rotate=90)]
    members = _docx() if kind == "docx" else test_epub.BOOK
    return [_members(members), makers.zipped(members)]


def _docx() -> dict[str, str | bytes]:
    body = test_docx.paragraph("One", '<w:pStyle w:val="Titel"/>') + test_docx.run("two", "<w:b/>") + _CHART
    body += test_docx.table((test_docx.paragraph("a"), test_docx.paragraph("b")), (test_docx.paragraph("c"),))
    document = f"<w:document {test_docx.W} {test_docx.M}><w:body>{body}<m:oMath/></w:body></w:document>"
    notes = f'<w:footnotes {test_docx.W}><w:footnote w:id="2">{test_docx.paragraph("n")}</w:footnote></w:footnotes>'
    return {"word/document.xml": document, "word/styles.xml": test_docx.STYLES, "word/footnotes.xml": notes}


def _members(members: Mapping[str, str | bytes]) -> bytes:
    data = {name: content.encode() if isinstance(content, str) else content for name, content in members.items()}
    return b"".join(MARK + name.encode() + b"\n" + content for name, content in data.items())


def _zipped(data: bytes) -> bytes:
    """The zip file of which these are the members."""
    if data.startswith(b"PK"):
        return data
    parts = (part.partition(b"\n") for part in data.split(MARK)[1:])
    return makers.zipped({_name(name): content for name, _, content in parts})


def _name(name: bytes) -> str:
    return re.sub(r"[^ -~]", "_", name.decode("latin-1"))[:100] or "_"


def read(path: Path, *, kind: str) -> None:
    """Reads a file, and checks that its text can be written and its places lie in it."""
    data = path.read_bytes()
    try:
        document = formats.parse(_zipped(data) if kind in ("docx", "epub") else data, f"a.{kind}")
    except Unreadable as error:
        raise NectarError(str(error)) from error
    _check(document)


def _check(document: Document) -> None:
    text, edits = normalized(document.text)
    position, end = position_map(edits), 0
    text.encode()
    for place in document.places:
        start, end = max(end, position(place.start)), position(place.end)
        assert 0 <= start <= end <= len(text), "a place lies outside of the text"
