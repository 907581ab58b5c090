"""Subtitles (SRT, VTT): what is said, with a place for each minute."""

import re

from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.reading import Document, Places, Unreadable

_TIMES = re.compile(r"\s*(?:(\d{1,3}):)?(\d\d):\d\d[.,]\d{1,3}\s*-->.*")
_TAG = re.compile(r"</?[a-zA-Z0-9.:][^<>]{0,100}>|\{\\[^{}]{1,100}\}")


def read_subtitles(data: bytes, name: str) -> Document:
    """Lines that are said again, as in rolling subtitles, are read once."""
    text, left_out = decode(data)
    minutes: dict[int, list[str]] = {}
    minute, shown, last = -1, False, ""
    for line in text.split("\n"):
        if times := _TIMES.fullmatch(line):
            minute, shown = 60 * int(times[1] or 0) + int(times[2]), True
        elif not line.strip():
            shown = False
        elif shown and (said := _TAG.sub("", line).strip()) and said != last:
            minutes.setdefault(minute, []).append(said)
            last = said
    if not minutes:
        raise Unreadable("it holds no subtitles")
    places = Places("minute")
    for minute, lines in sorted(minutes.items()):
        places.add(f"{minute // 60}:{minute % 60:02}", "\n".join(lines))
    return Document("subtitles", *places.result(), left_out)
