"""How a library fits a volume: the one place from which it reaches the fit."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..core.progress import Log, Progress, no_log, silent
from ..core.types import JsonObject
from ..documents import Reading
from ..errors import NectarError
from .volumes import Identity

if TYPE_CHECKING:
    from .. import store
    from ..fitting.config import FitConfig
    from ..fitting.work import Shape

_CHARACTERS = 4  # of a token, about


class Fitter(Protocol):
    """Fits texts on one model.

    name, adapter: of the model, known without loading it. identity: of the model itself.
    """

    @property
    def name(self) -> str: ...

    @property
    def adapter(self) -> str: ...

    @property
    def identity(self) -> Identity: ...

    def fit(
        self,
        reading: Reading,
        output: Path,
        *,
        source: str,
        partial: Path,
        progress: Progress,
        former: Path | None = None,
    ) -> None:
        """Writes a .nectar, and what belongs beside it.

        reading: the text, with its documents and their places. source: what the file says of the text. partial: a
        folder from which an interrupted fit goes on; it may be left behind. former: the .nectar of the text before it
        was changed, to start from. NectarError for a text that cannot be fitted.
        """

    def expected(self, characters: int) -> float:
        """Seconds that the fit of so long a text is expected to take; 0 where that is not known."""

    def is_whole(self, path: Path) -> bool:
        """Whether this is a whole .nectar of this model."""


class ModelFitter:
    """Fits as `nectar fit` does. The model is loaded when it is first needed."""

    def __init__(self, name: str, options: JsonObject | None = None, *, adapter: str = "", log: Log = no_log):
        """options: fields of `fitting.config.FitConfig`. adapter: the model's, "" for none."""
        self.name, self.options, self.adapter, self._log = name, options or {}, adapter, log

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from .. import models

        return models.load(self.name, adapter=self.adapter or None, log=self._log)

    @cached_property
    def identity(self) -> Identity:
        from .. import models

        model, tokenizer = self._loaded
        digests = models.fingerprint(model), models.tokenizer_fingerprint(tokenizer)
        return Identity(self.name, *digests, self.adapter)

    @cached_property
    def _config(self) -> "FitConfig":
        from ..fitting.config import FitConfig

        return FitConfig(keep_study=True, **self.options)

    @cached_property
    def _shape(self) -> "Shape":
        from ..fitting.machines import shape_of
        from ..mlxlm import attention_patch

        return shape_of(self._loaded[0], attention_patch.route(self._loaded[0]), self.name)

    def expected(self, characters: int) -> float:
        """As for a fit from the start, also where an update may take less."""
        from ..fitting.estimate import estimate
        from ..fitting.machines import here

        try:
            return estimate(self._shape, here(), self._config, max(1, characters // _CHARACTERS)).seconds
        except NectarError:  # its fit will say so
            return 0.0

    def fit(
        self,
        reading: Reading,
        output: Path,
        *,
        source: str,
        partial: Path,
        progress: Progress = silent,
        former: Path | None = None,
    ) -> None:
        from ..fitting import pipeline, updating
        from ..fitting.checkpoint import Checkpoint
        from ..nectar import Nectar

        model, tokenizer = self._loaded
        checkpoint, config = Checkpoint(partial), self._config
        if former is not None and (before := _read(former)) is not None:
            tensors, metadata = before
            outcome = updating.update(
                model,
                tokenizer,
                reading.text,
                tensors=tensors,
                metadata=metadata,
                config=config,
                source=source,
                progress=progress,
                checkpoint=checkpoint,
                log=self._log,
            )
            if outcome.tensors is None or outcome.metadata is None:
                nectar = Nectar.load(former, model)  # with the keys beside it
            else:
                nectar = Nectar(outcome.tensors, outcome.metadata, outcome.keys)
        else:
            fitted = pipeline.fit(
                model,
                tokenizer,
                reading.text,
                config=config,
                name=self.name,
                source=source,
                progress=progress,
                checkpoint=checkpoint,
                log=self._log,
            )
            nectar = Nectar(*fitted)
        nectar.keep(reading, tokenizer)
        nectar.save(output)
        checkpoint.clear()

    def is_whole(self, path: Path) -> bool:
        from .. import store

        if not path.is_file():
            return False
        try:
            metadata = store.read(path)[1]
        except NectarError:
            return False
        return (metadata["model_sha256"], metadata["tokenizer_sha256"]) == self.identity.digests


def _read(path: Path) -> "tuple[store.Tensors, store.Metadata] | None":
    """A file's tensors and metadata; None where it is gone or damaged."""
    from .. import store

    try:
        return store.read(path)
    except (NectarError, OSError):
        return None
