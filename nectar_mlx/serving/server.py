"""How the server starts, and how it ends in order."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from .. import store
from ..core.local_server import LocalSocket
from ..core.progress import Log, no_log
from ..errors import NectarError
from ..library import Library
from ..models import hub
from .adding import Adding
from .admission import Settings
from .app import make_app
from .connection import MAX_HEADLESS, Connection
from .engine import Engine
from .guard import Access
from .library import ServedLibrary
from .library_api import LibraryApi
from .service import Defaults, Service
from .shelf import Shelf

_GRACE = 5  # seconds that open requests get to finish when the server is stopped
_THREAD_EXIT = 0.3  # seconds that an ended engine may need to free MLX's memory
_KEEP_ALIVE = 30  # seconds that a connection may stay open between two requests
_HEAD_BYTES = 64 << 10  # of a request
_BACKLOG = MAX_HEADLESS  # accepted at a time: connections are counted only in between


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to serve. host, port: where to listen; port 0 takes a free one. max_body: bytes of a request."""

    host: str = "127.0.0.1"
    port: int = 8080
    max_body: int = 8_000_000
    access: Access = field(default_factory=Access)
    defaults: Defaults = field(default_factory=Defaults)
    settings: Settings = field(default_factory=Settings)


class Server:
    """A server whose model is loaded and whose socket is bound; `run` serves until a signal or `shutdown`."""

    def __init__(
        self,
        engine: Engine,
        options: Options,
        listener: socket.socket,
        *,
        library: ServedLibrary | None = None,
        adding: Adding | None = None,
        log: Log = no_log,
    ):
        self.engine, self.service = engine, Service(engine, options.defaults, library)
        self._adding = adding
        self._listener = listener
        self._local = LocalSocket(engine.shelf.files, options.access.key)
        self.host, self.port = listener.getsockname()[:2]
        routes = LibraryApi(self.service, adding).routes()
        app = make_app(self.service, options.access, max_body=options.max_body, routes=routes)
        config = uvicorn.Config(
            app,
            http=Connection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_GRACE,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            backlog=_BACKLOG,
        )
        self._uvicorn = _Uvicorn(config, log)

    def run(self) -> None:
        """Serves until the end; then no request is open, and the engine has stopped."""
        try:
            self._uvicorn.run(sockets=[self._listener, *self._local.listeners])
        finally:
            self.close()

    def shutdown(self) -> None:
        """Makes `run` end; from any thread."""
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """Ends the engine. Where it does not end, as in a long computation, the process does."""
        self._listener.close()
        self._local.close()
        if self._adding is not None:
            self._adding.stop()
        self.service.prompting.close()
        ended = self.engine.stop(timeout=_GRACE)
        if not ended and self._uvicorn.signals:
            os._exit(0)
        threading.Event().wait(_THREAD_EXIT)  # the thread frees MLX's memory, for which it needs the interpreter


class _Uvicorn(uvicorn.Server):
    """Ends in order at the first SIGINT or SIGTERM, and at once at the second."""

    def __init__(self, config: uvicorn.Config, log: Log):
        super().__init__(config)
        self._log, self.signals = log, 0
        logging.getLogger("uvicorn.error").addFilter(_was_not_cancelled)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            # Signals that come while the engine stops end the process at once, too.
            self._before = before

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals > 1:
            os._exit(130)
        self._log("stopping: answers get a few seconds to end; once more ends at once")
        self.should_exit = True


def _was_not_cancelled(record: logging.LogRecord) -> bool:
    """Leaves out a traceback for each answer that is cut off at the end: uvicorn says in a line how many there were."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def start(
    nectars: Sequence[str],
    model: str | None,
    options: Options,
    *,
    library: Library | None = None,
    adapter: str | None = None,
    fetch: bool = False,
    log: Log = no_log,
) -> Server:
    """A server for these files, ready to `run`.

    nectars: .nectar files, folders of them, or ids on the hub. model: its name, None for the one they were fitted on,
    which is downloaded only with fetch. adapter: of the model. library: to be served in the place of files; then these
    are those that it is fitted on. NectarError for an error in the user's input.
    """
    if not options.access.key and not _is_loopback(options.host):
        raise NectarError(
            f"{options.host} can be reached from other machines: set NECTAR_API_KEY or give --api-key-file, or leave "
            "out --host"
        )
    files = find_files(nectars)
    name = model or _common_model(files)
    listener = _listen(options.host, options.port)
    may_fetch = None if model else lambda _: fetch  # whoever made the files chose their model
    engine = Engine(lambda: Shelf(name, files, adapter=adapter, may_fetch=may_fetch, log=log), options.settings)
    try:
        engine.start()
        if library is None:
            return Server(engine, options, listener, log=log)
        served = ServedLibrary(library, engine)
        served.warm()
        return Server(engine, options, listener, library=served, adding=Adding(library, name, adapter), log=log)
    except BaseException:
        listener.close()
        raise


def find_files(nectars: Sequence[str]) -> dict[str, Path]:
    """The files by the name under which they are served."""
    files: dict[str, Path] = {}
    for nectar in nectars:
        folder = Path(nectar)
        found = sorted(folder.glob("*.nectar")) if folder.is_dir() else [hub.nectar_file(nectar)]
        if not found:
            raise NectarError(f"{nectar}: no .nectar file in this folder")
        for file in found:
            name = file.stem if folder.is_dir() or nectar.endswith(".nectar") else nectar
            if name in files:
                raise NectarError(f"two .nectar files have the same name, {name}, which is their id: rename one")
            files[name] = file
    return files


def _common_model(files: Mapping[str, Path]) -> str:
    models = {store.model_name(file): name for name, file in files.items()}
    if len(models) > 1:
        which = ", ".join(f"{name} on {model}" for model, name in list(models.items())[:4])
        raise NectarError(f"these files are of different models ({which}): serve those of one model at a time")
    return next(iter(models))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise NectarError(f"cannot listen on {host}:{port}, which is in use: --port takes another one") from None
        reason = getattr(error, "strerror", None) or error
        raise NectarError(f"cannot listen on {host}:{port}: {reason}") from None


def _is_loopback(host: str) -> bool:
    try:
        entries = socket.getaddrinfo(host or "0.0.0.0", None)
    except OSError:
        raise NectarError(f"there is no host {host}") from None
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in entries)
