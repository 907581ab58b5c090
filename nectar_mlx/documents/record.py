"""What a .nectar keeps of a reading beside the text, as JSON, and the reading back from it."""

import base64
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nectar_mlx.core import json_text
from nectar_mlx.documents.reading import Edit, FileReport, Place, Reading

_MOST_LISTED = 1 << 20  # characters of the reports that are not packed: thousands of files or pages
_LISTINGS = ("files", "packed_files")
_VALUES_EACH = 4  # that a character of the text may have in the record: where every one is edited it has three


def record(reading: Reading, *, characters: int | None = None) -> dict[str, object]:
    """`files`, the reports, or `packed_files` where there are thousands, as a file's metadata are limited; and `edits`,
    what normalization changed, where it changed anything. What would be too large to be read again is left out.

    characters: of the text that the file keeps (all of it).
    """
    most = _most_values(len(reading.text) if characters is None else characters)
    kept = _listing(reading.as_list(), most)
    if reading.edits:
        flat = [value for gap, edit in _gaps(reading.edits) for value in (gap, edit.end - edit.start, edit.original)]
        if _fits(text := json.dumps(flat), most):
            kept["edits"] = packed(text)
    return kept


def restored(text: str, kept: Mapping[str, object], *, name: str, characters: int | None = None) -> Reading:
    """The reading of which `record` kept this, and the file its text.

    name: of the one document, where no files were kept. characters: as for `record`. ValueError, KeyError or TypeError
    if it is damaged.
    """
    characters = len(text) if characters is None else characters
    files = listed(kept, characters=characters)
    if not isinstance(files, list) or not files:
        return Reading(text, [FileReport(name, characters=len(text), end=len(text))])
    edits = kept.get("edits")
    return Reading(text, [_report(file) for file in files], list(_edits(str(edits), characters)) if edits else [])


def listed(kept: Mapping[str, object], *, characters: int) -> object:
    """The reports of a reading's files, of which `record` kept this, as they were listed; errors as of `restored`.

    characters: as for `record`.
    """
    return _decoded(str(kept["packed_files"]), characters) if "packed_files" in kept else kept.get("files")


def renamed(kept: Mapping[str, object], names: Sequence[str], *, characters: int) -> dict[str, object]:
    """The same with other names of the documents, if it tells of as many; errors as of `restored`.

    characters: as for `record`.
    """
    files = listed(kept, characters=characters)
    if not isinstance(files, list) or len(files) != len(names):
        return dict(kept)
    files = [{**file, "name": name} for file, name in zip(files, names, strict=True)]
    others = {name: value for name, value in kept.items() if name not in _LISTINGS}
    return others | _listing(files, _most_values(characters))


def packed(text: str) -> str:
    """A text in fewer bytes, as ASCII."""
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(packed: str, *, characters: int) -> str:
    """ValueError if it is damaged, or far larger than what belongs to a text of so many characters."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b85decode(packed), json_text.BYTES_EACH * _most_values(characters))
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not unpacker.eof:
        raise ValueError("a packed text is cut short or too large")
    return data.decode()


def _listing(files: Sequence[dict[str, object]], most_values: int) -> dict[str, object]:
    """The reports as they are kept: one of _LISTINGS, or nothing."""
    text = json.dumps(files)
    if len(text) <= _MOST_LISTED:
        return {"files": list(files)}
    return {"packed_files": packed(text)} if _fits(text, most_values) else {}


def _most_values(characters: int) -> int:
    """That are read again. A file may come from anyone, and a value takes far more memory than room in the file."""
    return json_text.MOST_VALUES + _VALUES_EACH * characters


def _fits(text: str, most_values: int) -> bool:
    try:
        json_text.check_size(text.encode(), most_values=most_values)
    except ValueError:
        return False
    return True


def _decoded(packed: str, characters: int) -> Any:
    return json_text.decode(unpacked(packed, characters=characters), most_values=_most_values(characters))


def _gaps(edits: Sequence[Edit]) -> Iterator[tuple[int, Edit]]:
    """Each edit with its distance from the one before: small numbers, which pack well."""
    position = 0
    for edit in edits:
        yield edit.start - position, edit
        position = edit.end


def _edits(packed: str, characters: int) -> Iterator[Edit]:
    flat, position = _decoded(packed, characters), 0
    for gap, length, original in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        if not (isinstance(gap, int) and isinstance(length, int) and min(gap, length) >= 0):
            raise ValueError("an edit lies nowhere in the text")
        start = position + gap
        position = start + length
        yield Edit(start, position, str(original))


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
