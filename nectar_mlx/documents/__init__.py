"""Documents as text: files and folders go in, light Markdown with places comes out, and nothing is lost silently."""

from collections.abc import Sequence
from pathlib import Path

from nectar_mlx.documents import record, worker
from nectar_mlx.documents.files import Source, find
from nectar_mlx.documents.formats import needs_process, parse
from nectar_mlx.documents.normalize import normalized, position_map
from nectar_mlx.documents.packages import is_package
from nectar_mlx.documents.reading import Document, Edit, FileReport, Place, Reading, Unreadable
from nectar_mlx.errors import NectarError

__all__ = ["Edit", "FileReport", "Place", "Reading", "find", "read", "record"]


def read(
    paths: Sequence[str | Path], *, include: Sequence[str] = (), exclude: Sequence[str] = (), strict: bool = False
) -> Reading:
    """The text of documents, in the order given; a folder stands for the files in it, in natural order.

    Args:
        paths: files and folders; "-" is standard input.
        include: patterns (`*.md`, `notes/*`); in folders only what matches one is read.
        exclude: patterns of what is left aside in folders.
        strict: refuse if one file cannot be read, or if a part of one cannot.

    Returns:
        The text, headed by the files' names where there are several, and a report on each file.

    Raises:
        NectarError: in one line, for what is missing, if nothing can be read, or if `strict` is not met.
    """
    sources = find(paths, include=include, exclude=exclude)
    if not paths:
        raise NectarError("no document was given")
    if not sources:
        raise NectarError(f"{', '.join(map(str, paths))}: the folder holds no document")
    documents = [_document(source) for source in sources]
    reading = _joined(sources, documents)
    _check(reading, strict=strict, paths=paths)
    return reading


def _document(source: Source) -> Document | str:
    """The document, or the reason why it cannot be read."""
    try:
        data = source.bytes()
        return (worker.parse if needs_process(data, source.name) else parse)(data, source.name)
    except Unreadable as error:
        return " ".join(str(error).split())


def _joined(sources: Sequence[Source], documents: Sequence[Document | str]) -> Reading:
    several = len(sources) > 1
    reading, parts, length = Reading("", []), list[str](), 0
    for source, document in zip(sources, documents, strict=True):
        if isinstance(document, str):
            reading.files.append(FileReport(source.name, reason=document))
            continue
        text, edits = normalized(document.text)
        heading = f"# {source.name}\n\n" if several else ""
        if parts:
            heading = "\n\n" + heading
        parts += [heading, text]
        start = length + len(heading)
        length = start + len(text)
        reading.edits += [Edit(edit.start + start, edit.end + start, edit.original) for edit in edits]
        reading.files.append(_report(source, document, start, length, edits))
    reading.text = "".join(parts)
    return reading


def _report(source: Source, document: Document, start: int, end: int, edits: Sequence[Edit]) -> FileReport:
    position = position_map(edits)
    places = [
        Place(place.unit, place.name, start + position(place.start), start + position(place.end))
        for place in document.places
    ]
    return FileReport(source.name, document.kind, end - start, start, end, places, document.left_out)


def _check(reading: Reading, *, strict: bool, paths: Sequence[str | Path]) -> None:
    failed = [report.describe() for report in reading.files if not report.was_read]
    if len(failed) == len(reading.files) == 1 and len(paths) == 1 and _is_one(Path(paths[0])):
        raise NectarError(f"{paths[0]}: {reading.files[0].reason}")
    if len(failed) == len(reading.files):
        raise NectarError(f"none of the files can be read: {'; '.join(failed)}")
    partly = [report.describe() for report in reading.files if report.left_out] if strict else []
    if strict and (failed or partly):
        raise NectarError(f"not everything can be read: {'; '.join([*failed, *partly])}")


def _is_one(path: Path) -> bool:
    """Whether a path stands for itself, not for files in it."""
    return path.is_file() or is_package(path)
