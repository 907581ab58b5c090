"""Charts of Office documents: the title and the numbers that the file keeps of them, as a table."""

from collections.abc import Iterator

from nectar_mlx.documents import blocks
from nectar_mlx.documents.archive import Element, child, children, local

_MOST_CELLS = 20_000  # of one chart
_MOST_SERIES = 255  # as in Excel
_TITLE = {"cat": "xVal", "val": "yVal"}  # as a chart of points names them


def chart(root: Element) -> str:
    """The chart as a table: a row for each category, a column for each series; empty if it keeps no numbers."""
    series = [item for item in root.iter() if local(item) == "ser"][:_MOST_SERIES]
    columns = [_points(item, "val") for item in series]
    labels = next((found for item in series if (found := _points(item, "cat"))), {})
    places = sorted({place for column in (labels, *columns) for place in column})
    places = places[: _MOST_CELLS // (1 + len(series))]
    names = [" ".join(_cached(child(item, "tx")).values()) for item in series]
    rows = [["", *names]] if any(names) else []
    rows += [[labels.get(place, str(place + 1)), *(column.get(place, "") for column in columns)] for place in places]
    title = " ".join(" ".join(_texts(child(root, "chart", "title"))).split())
    return "\n".join(part for part in (title, blocks.table(rows)) if part)


def _points(series: Element, kind: str) -> dict[int, str]:
    found = child(series, kind)
    return _cached(child(series, _TITLE[kind]) if found is None else found)


def _cached(element: Element | None) -> dict[int, str]:
    """The values by their places."""
    values: dict[int, str] = {}
    for point in () if element is None else element.iter():
        if local(point) == "pt" and (place := point.get("idx", "")).isdecimal() and len(place) < 8:
            values[int(place)] = " ".join((value.text or "") for value in children(point, "v")).strip()
    return values


def _texts(element: Element | None) -> Iterator[str]:
    return (item.text or "" for item in (() if element is None else element.iter()) if local(item) in ("t", "v"))
