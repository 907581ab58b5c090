"""Rich text (RTF)."""

import re

from nectar_mlx.documents.blocks import row
from nectar_mlx.documents.reading import Document, Unreadable

# Notes and margins are text, which the parser would skip; a raised number keeps its sense: 10^6 is not 106.
_KEPT = re.compile(r"\{\\(?:footnote|header[lrf]?|footer[lrf]?)\b")
_RAISED = re.compile(r"(\\super(?:\\[a-z]+-?\d*){0,5} ?)([+-]?\d+)\b")


def read_rtf(data: bytes, name: str) -> Document:
    """A rich text file; its pictures are counted, not read."""
    from striprtf.striprtf import rtf_to_text

    rtf = data.decode("latin-1")
    if not rtf.lstrip().startswith("{\\rtf"):
        raise Unreadable("not an RTF file")
    pictures = len(re.findall(r"\{(?:\\\*)?\\(?:shppict|pict)\b", rtf)) - len(re.findall(r"\{\\\*\\shppict\b", rtf))
    text = rtf_to_text(_RAISED.sub(r"\1^\2", _KEPT.sub(r"{\\par ", rtf)), errors="replace")
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # \u-10179\u-8694 is one character
    lines = [row(line.split("|")) if line.endswith("|") else line.rstrip() for line in text.split("\n")]
    left_out = [f"{pictures} picture{'s' * (pictures > 1)}"] if pictures > 0 else []
    return Document("rtf", "\n".join(lines).strip("\n"), left_out=left_out)
