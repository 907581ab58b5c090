"""What the page needs beside the answers: the documents, adding and removing them, and the passage behind a source."""

import asyncio
import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute
from starlette.routing import Route as At

from .. import store
from ..core.types import JsonObject
from ..documents import Reading
from ..errors import NectarError
from ..fitting import verdict
from ..library import Document
from .adding import Adding
from .errors import ApiError
from .library import LIBRARY, result
from .service import Service
from .upload import MAX_UPLOAD, Upload
from .web import Json, Request, Route

_AROUND = 3_000  # characters that are shown before and after a passage, at most
_PASSAGE = 10_000  # characters of a passage, at most
_DIGITS = 15  # of a place in a text, at most: `int` refuses thousands
_NO_PASSAGE = ApiError(400, "the text has no such passage", code="invalid_value")


class LibraryApi:
    """adding: None where single files are served."""

    def __init__(self, service: Service, adding: Adding | None):
        self._service, self._adding = service, adding
        self._shelf = service.engine.shelf

    def routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = [
            At("/api/library", Route(self.show), methods=["GET"]),
            At("/api/library/passage/{start}/{end}/{model:path}", Route(self.passage), methods=["GET"]),
        ]
        if self._adding is not None and self._service.library is not None:
            folder = self._service.library.library.folder.documents
            routes += [
                At("/api/library/files/{name}", Upload(folder, self._adding.add), methods=["PUT"]),
                At("/api/library/documents/{id}", Route(self.remove), methods=["DELETE"]),
                At("/api/library/update", Route(self.update, limit=1_000), methods=["POST"]),
            ]
        return routes

    async def show(self, request: Request) -> Json:
        """All documents, and what is being done to them."""
        return Json(await asyncio.to_thread(self._show))

    def _show(self) -> JsonObject:
        library, adding = self._service.library, self._adding
        if library is None or adding is None:
            files = [_of_file(name, path) for name, path in self._shelf.files.items()]
            return {"library": None, "documents": files, "busy": False, "message": "", "max_upload": 0}
        busy, pending = adding.busy, [path for path in adding.pending if path.exists()]
        documents = library.refresh()
        known = {document.path for document in documents.values()}
        waiting = [_of_pending(path) for path in pending if os.fsencode(path) not in known]
        return {
            "library": LIBRARY,
            "documents": [_of_document(name, document.looked_at()) for name, document in documents.items()] + waiting,
            "busy": busy,
            "message": adding.message,
            "max_upload": MAX_UPLOAD,
        }

    async def remove(self, request: Request) -> Json:
        """Takes a document out of the library; what was uploaded is deleted, other files stay where they are."""
        return Json(await asyncio.to_thread(self._remove, request.params["id"]))

    def _remove(self, wanted: str) -> JsonObject:
        assert self._service.library is not None and self._adding is not None
        served = self._service.library
        paths = [d.path for d in served.library.documents() if _identifier(d.path) == wanted]
        if not paths:
            return self._remove_waiting(wanted)
        path = Path(os.fsdecode(paths[0]))
        removed = served.library.remove([path])
        if path.parent == served.library.folder.documents.absolute():
            path.unlink(missing_ok=True)
        served.refresh()
        if removed.waiting:
            self._adding.update()
        return {"removed": removed.documents, "waiting": removed.waiting}

    def _remove_waiting(self, wanted: str) -> JsonObject:
        """Deletes an upload that no process has read yet."""
        assert self._adding is not None
        paths = [path for path in self._adding.pending if _identifier(os.fsencode(path)) == wanted and path.exists()]
        if not paths:
            raise ApiError(404, "this document is no longer in the library", code="not_found")
        paths[0].unlink(missing_ok=True)
        return {"removed": [str(paths[0])], "waiting": []}

    async def update(self, request: Request) -> Json:
        """Looks again at all files, and tries again what could not be fitted."""
        assert self._adding is not None
        self._adding.update()
        return Json({"busy": True}, 202)

    async def passage(self, request: Request) -> Json:
        """A source's passage with the text around it, up to the borders of its page."""
        return Json(await asyncio.to_thread(self._passage, request.params))

    def _passage(self, params: Mapping[str, Any]) -> JsonObject:
        engine, model = self._service.engine, self._service.name(params["model"])
        start, end = _number(params["start"]), _number(params["end"])
        reading = result(engine, engine.call(lambda: engine.shelf.get(model).passages(engine.shelf.tokenizer).reading))
        if not 0 <= start < end <= len(reading.text) or end - start > _PASSAGE:
            raise _NO_PASSAGE
        return _excerpt(reading, start, end)


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > _DIGITS:
        raise _NO_PASSAGE
    return int(text)


def _excerpt(reading: Reading, start: int, end: int) -> JsonObject:
    found = reading.place(start)
    file, place = found if found is not None else (None, None)
    within = place or file
    first = max(within.start if within else 0, start - _AROUND)
    last = min(max(end, within.end if within else len(reading.text)), end + _AROUND)
    return {
        "document": file.name if file else "",
        "place": place.label() if place else "",
        "before": reading.original(first, start),
        "passage": reading.original(start, end),
        "after": reading.original(end, last),
        "cut_before": first > (within.start if within else 0),
        "cut_after": last < (within.end if within else len(reading.text)),
    }


def _of_document(name: str, document: Document) -> JsonObject:
    """As the page shows it. model: None where it cannot be asked, yet."""
    progress = document.progress
    return _figures(document.file) | {
        "id": _identifier(document.path),
        "model": name if document.state == "ready" else None,
        "name": document.name,
        "title": name,
        "state": document.state,
        "reason": document.reason,
        "missing": document.missing,
        "kind": document.kind,
        "characters": document.characters,
        "left_out": document.left_out,
        "places": len(document.places),
        "unit": document.places[0].unit if document.places else "",
        "shared": document.shared,
        "progress": None if progress is None else progress._asdict(),
    }


def _of_pending(path: Path) -> JsonObject:
    return {"id": _identifier(os.fsencode(path)), "model": None, "name": path.name, "state": "waiting", "reason": ""}


def _of_file(name: str, path: Path) -> JsonObject:
    return _figures(path) | {"id": _identifier(os.fsencode(path)), "model": name, "name": name, "state": "ready"}


def _figures(path: Path | None) -> JsonObject:
    """The size of a fitted file, and how close its answers are to those with the whole text."""
    try:
        if path is not None:
            stat = path.stat()
            return {"bytes": stat.st_size} | _verdict(path, stat.st_size, stat.st_mtime_ns)
    except (OSError, NectarError):
        pass
    return {"bytes": None, "grade": None, "verdict": ""}


@lru_cache(4096)
def _verdict(path: Path, size: int, changed: int) -> JsonObject:
    report = store.report(path)
    return {"grade": verdict.grade(report), "verdict": str(report.get("verdict", ""))}


def _identifier(path: bytes) -> str:
    """What an address calls a document: its name may come to be another one's."""
    return hashlib.sha256(path).hexdigest()[:16]
