"""Ctrl-C that is not lost.

Python cannot raise what happens while it destroys an object: it prints a KeyboardInterrupt there, and goes on.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SOON = 0.02  # seconds, until the object is destroyed


@contextmanager
def kept() -> Iterator[None]:
    """Inside, a KeyboardInterrupt that Python would only print is raised again a moment later, in the main thread."""
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        again = threading.Timer(_SOON, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
