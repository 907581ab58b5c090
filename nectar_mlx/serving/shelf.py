"""One model and the .nectar files on it: read when they are needed, the least recently used put away under a limit."""

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import models
from ..core.progress import Log, no_log
from ..core.types import JsonObject
from ..errors import NectarError
from ..models import MayFetch
from ..nectar import Nectar

Key = tuple[Path, int | None]  # a file, and the chunk of its text


class UnknownModel(NectarError):
    """A request names a model that is not served."""


class UnreadableFile(NectarError):
    """A file that is served cannot be read."""


class Shelf:
    """Belongs to the engine's thread, where MLX computes. Only `files` may be read from another one.

    model_name: of the model, which is loaded once; adapter, may_fetch: as for `models.load`. files: by name; several
    names may stand for one file. on_close: called with what is put away.
    """

    def __init__(
        self,
        model_name: str,
        files: Mapping[str, Path],
        *,
        adapter: str | None = None,
        may_fetch: MayFetch | None = None,
        log: Log = no_log,
    ):
        self.files, self._log = dict(files), log
        self.model: nn.Module
        self.tokenizer: TokenizerWrapper
        self.model, self.tokenizer = models.load(model_name, adapter=adapter, log=log, may_fetch=may_fetch)
        self.on_close: Callable[[Nectar], None] = lambda nectar: None
        self._open: OrderedDict[Key, Nectar] = OrderedDict()
        # Also those that were put away while an answer still uses them.
        self._alive: weakref.WeakValueDictionary[Key, Nectar] = weakref.WeakValueDictionary()
        self._sizes: weakref.WeakKeyDictionary[Nectar, int] = weakref.WeakKeyDictionary()  # asked for at every step
        self._first: JsonObject | None = None

    def get(self, name: str, chunk: int | None = None) -> Nectar:
        """A file, or one chunk of its text as if it alone had been fitted; UnknownModel or UnreadableFile."""
        if name not in self.files:
            raise UnknownModel(f"there is no model {name!r}; there are: {listed(self.files)}")
        key = self.files[name], chunk
        if key not in self._open:
            nectar = self._alive.get(key)
            if nectar is None:
                nectar = self._read(name) if chunk is None else self.get(name).chunk(chunk)
                self._sizes[nectar] = nectar.nbytes
            self._open[key] = self._alive[key] = nectar
        self._open.move_to_end(key)
        return self._open[key]

    @property
    def open(self) -> int:
        """How many files, or chunks of them, are in memory."""
        return len(self._alive)

    @property
    def nbytes(self) -> int:
        return sum(self._sizes[nectar] for nectar in list(self._alive.values()))

    def shrink(self, nbytes: int) -> None:
        """Puts away what was used least recently until the rest has at most so many bytes, or is the last one."""
        while self.nbytes > nbytes and len(self._open) > 1:
            self._close(next(iter(self._open)))

    def replace(self, files: Mapping[str, Path]) -> None:
        """Takes other files; those that are no longer among them are put away."""
        gone = set(self.files.values()) - set(files.values())
        self.files = dict(files)
        for path in gone:
            self.put_away(path)

    def put_away(self, path: Path) -> None:
        """Forgets a file that has changed or is gone."""
        for key in [key for key in list(self._alive) if key[0] == path]:
            self._alive.pop(key, None)
            if key in self._open:
                self._close(key)

    def _close(self, key: Key) -> None:
        self.on_close(self._open.pop(key))

    def _read(self, name: str) -> Nectar:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                nectar = Nectar.load(self.files[name], self.model, self.tokenizer, like=self._first)
            except NectarError as error:
                raise UnreadableFile(str(error)) from error
        for warning in caught:
            self._log(str(warning.message))
        if not nectar.faithful:
            self._log(f"{name}: {nectar.verdict}")
        mx.eval([bank.parameters for bank in nectar.banks])  # now, not within somebody's answer
        self._first = self._first or nectar.metadata
        return nectar


def listed(files: Iterable[str], *, most: int = 20) -> str:
    """The files' names for a message."""
    names = list(files)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
