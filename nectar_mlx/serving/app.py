"""The server's routes."""

from collections.abc import Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as StarletteRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount
from starlette.routing import Route as At
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from .embeddings_api import Embeddings
from .errors import ApiError
from .guard import Access, Guard
from .lingering import Lingering
from .ollama_api import Ollama, error_body
from .openai_api import OpenAI
from .responses_api import Responses
from .service import Service
from .web import Route

PAGE = Path(__file__).parent / "page"
_WORDS = {404: "there is nothing at this path", 405: "this path does not take this method"}


def make_app(
    service: Service, access: Access, *, max_body: int, page: Path = PAGE, routes: Sequence[BaseRoute] = ()
) -> ASGIApp:
    """The ASGI application.

    max_body: bytes of a request. page: a folder of static files with an index.html, shown at / where it exists; what it
    refers to is below /page/. routes: more of them, such as /api/library/...; they stand behind the same guard, and
    `web.Route` gives them bounded bodies and errors in JSON.
    """
    openai, responses, ollama = OpenAI(service), Responses(service), Ollama(service)

    def post(path: str, endpoint: Route) -> At:
        return At(path, endpoint, methods=["POST"])

    async def health(request: StarletteRequest) -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def metrics(request: StarletteRequest) -> Response:
        return PlainTextResponse(service.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    table: list[BaseRoute] = [
        At("/health", health),
        At("/metrics", metrics),
        At("/v1/models", Route(openai.models), methods=["GET"]),
        At("/v1/models/{name:path}", Route(openai.model), methods=["GET"]),
        post("/v1/chat/completions", Route(openai.chat, limit=max_body)),
        post("/v1/completions", Route(openai.completion, limit=max_body)),
        post("/v1/responses", Route(responses.create, limit=max_body)),
        post("/v1/embeddings", Route(Embeddings(service).create, limit=max_body)),
        At("/api/version", Route(ollama.version), methods=["GET"]),
        At("/api/tags", Route(ollama.tags), methods=["GET"]),
        At("/api/ps", Route(ollama.running), methods=["GET"]),
        post("/api/show", Route(ollama.show, limit=max_body, style=error_body)),
        post("/api/chat", Route(ollama.chat, limit=max_body, style=error_body)),
        post("/api/generate", Route(ollama.generate, limit=max_body, style=error_body)),
        *routes,
        *_page(page),
    ]
    app = Starlette(routes=table, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False
    return Lingering(Guard(app, access, service.engine.metrics))


def _page(folder: Path) -> list[BaseRoute]:
    index = folder / "index.html"
    if not index.is_file():
        return [At("/", _no_page)]

    async def show(request: StarletteRequest) -> Response:
        return FileResponse(index)

    return [At("/", show), Mount("/page", StaticFiles(directory=folder))]


async def _no_page(request: StarletteRequest) -> Response:
    return PlainTextResponse("Ollama is running\n")  # what its front ends look for


async def _http_error(request: StarletteRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, _WORDS.get(error.status_code, error.detail), code="not_found")
    return JSONResponse(told.body, error.status_code, headers=error.headers)
