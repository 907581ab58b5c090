"""What a .nectar keeps of a reading beside the text, as JSON, and the reading back from it."""

import base64
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nectar_mlx.documents.reading import Edit, FileReport, Place, Reading

_MOST_LISTED = 1 << 20  # characters of the reports that are not packed: thousands of files or pages
_MOST_BYTES = 1 << 28  # of what is packed; a file may come from anyone


def record(reading: Reading) -> dict[str, object]:
    """`files`, the reports, or `packed_files` where there are thousands, as a file's metadata are limited; and `edits`,
    what normalization changed, where it changed anything."""
    files = reading.as_list()
    kept: dict[str, object] = {"files": files}
    if len(text := json.dumps(files)) > _MOST_LISTED:
        kept = {"packed_files": packed(text)}
    if reading.edits:
        flat = [value for gap, edit in _gaps(reading.edits) for value in (gap, edit.end - edit.start, edit.original)]
        kept["edits"] = packed(json.dumps(flat))
    return kept


def restored(text: str, kept: Mapping[str, object], *, name: str) -> Reading:
    """The reading of which `record` kept this, and the file its text.

    name: of the one document, where no files were kept. ValueError, KeyError or TypeError if it is damaged.
    """
    files = listed(kept)
    if not isinstance(files, list) or not files:
        return Reading(text, [FileReport(name, characters=len(text), end=len(text))])
    edits = kept.get("edits")
    return Reading(text, [_report(file) for file in files], list(_edits(str(edits))) if edits else [])


def listed(kept: Mapping[str, object]) -> object:
    """The reports of a reading's files, of which `record` kept this, as they were listed; errors as of `restored`."""
    return json.loads(unpacked(str(kept["packed_files"]))) if "packed_files" in kept else kept.get("files")


def packed(text: str) -> str:
    """A text in fewer bytes, as ASCII."""
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(packed: str) -> str:
    """ValueError if it is damaged, or far larger than any text."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b85decode(packed), _MOST_BYTES)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not unpacker.eof:
        raise ValueError("a packed text is cut short or too large")
    return data.decode()


def _gaps(edits: Sequence[Edit]) -> Iterator[tuple[int, Edit]]:
    """Each edit with its distance from the one before: small numbers, which pack well."""
    position = 0
    for edit in edits:
        yield edit.start - position, edit
        position = edit.end


def _edits(packed: str) -> Iterator[Edit]:
    flat, position = json.loads(unpacked(packed)), 0
    for gap, length, original in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        start = position + gap
        position = start + length
        yield Edit(start, position, original)


def _report(file: Mapping[str, Any]) -> FileReport:
    start, end = int(file["start"]), int(file["end"])
    if not 0 <= start <= end:
        raise ValueError("a document ends before it starts")
    unit = str(file.get("unit", ""))
    places = [Place(unit, str(name), int(first), int(last)) for name, first, last in file.get("places", [])]
    if any(not start <= place.start <= place.end <= end for place in places):
        raise ValueError("a part lies outside of its document")
    return FileReport(
        str(file["name"]),
        str(file.get("kind", "")),
        int(file.get("characters", end - start)),
        start,
        end,
        places,
        [str(note) for note in file.get("left_out", [])],
        str(file.get("reason", "")),
    )
