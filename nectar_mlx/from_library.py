"""The library as commands use it: their options, what fits for it, and the way from a question to a .nectar.

Where `nectar ask` and `nectar chat` take a .nectar, the word `library` stands for the library.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import cli, settings
from .core.types import JsonObject, Tokenizer
from .errors import FIT_AGAIN, NectarError
from .library import Added, Document, Identity, Library, ModelFitter, Routing, holds_library, none_of

if TYPE_CHECKING:
    import mlx.nn as nn

    from .nectar import Nectar

T = TypeVar("T")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fitter`."""
    parser.add_argument("--model", help="fit on this model (default: the library's, at first what `nectar fit` takes)")
    cli.add_adapter(parser)
    parser.add_argument("--budget", metavar="SHARE", help="bytes to keep, as for `nectar fit`; kept for later calls")
    parser.add_argument("--kind", help="of head function, as for `nectar fit`; kept for later calls")
    parser.add_argument("--effort", help="quick, normal or best, as for `nectar fit`; kept for later calls")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the regression; kept for later calls")
    parser.add_argument("--queries", type=int, metavar="N", help="captured queries a head; kept for later calls")


def open_library(args: argparse.Namespace, *, make: bool = False) -> Library:
    """That of --library, else of $NECTAR_LIBRARY, else of the settings, else the one in the user's data folder.

    make: whether --library may name a folder that holds none yet; else NectarError, for it is most likely mistyped.
    """
    chosen = args.library or os.environ.get("NECTAR_LIBRARY") or settings.read().library
    if args.library and not make and not holds_library(Path(args.library).expanduser()):
        raise NectarError(f"there is no library in {chosen}: `nectar add FOLDER --library {chosen}` makes one")
    return Library(chosen)


def fitter(library: Library, args: argparse.Namespace) -> ModelFitter:
    """What fits the library's documents; NectarError for wrong options, or where no model was ever chosen.

    Without --model and --budget the library's own are taken, at first those of the settings.
    """
    from .fitting.config import FitConfig, effort, parse_budget

    options = library.options
    known = library.identity
    budget = args.budget
    if budget is None and known is None and not options.keys() & {"budget", "size"}:
        budget = settings.read().budget
    if budget is not None:
        options = {name: value for name, value in options.items() if name not in ("budget", "size")}
        options |= parse_budget(budget)
    if args.effort is not None:
        options = {name: value for name, value in options.items() if name not in effort("best")}
        options |= effort(args.effort)
    options |= {n: value for n in ("kind", "steps", "queries") if (value := getattr(args, n)) is not None}
    FitConfig(**options)  # refuses what is wrong before any file is read
    name, adapter = _model(args, known)
    if Path(name).expanduser().exists():
        name = str(Path(name).expanduser().absolute())  # the library is asked from other folders, too
    library.options = options
    if adapter:
        adapter = str(Path(adapter).expanduser().absolute())
    return ModelFitter(name, options, adapter=adapter, log=cli.say)


def _model(args: argparse.Namespace, known: Identity | None) -> tuple[str, str]:
    """The model to fit on and its adapter, "" for none: those given, else the library's, else the default ones."""
    if args.model is None and known is not None:
        return known.name, args.adapter or known.adapter
    from .installed import choose  # imports mlx-lm, which takes a second and which `list` and `remove` do not need

    choose(args, log=cli.say)
    return args.model, args.adapter or ""


def report(added: Added, *, as_json: bool) -> None:
    """What was read and fitted, and each file that was not, with its reason."""
    for path, reason in (added.scan.failed | added.work.failed).items():
        cli.say(f"{path}: {reason}")
    cli.say(added.scan.summary())
    cli.say(added.work.summary())
    if as_json:
        print(json.dumps(vars(added.scan) | vars(added.work) | {"failed": added.scan.failed | added.work.failed}))


@dataclass
class Questions:
    """Finds, question by question, the document that answers, and holds the model and the file in use.

    document: the one in use; None before the first.
    """

    library: Library
    args: argparse.Namespace
    document: Document | None = None
    routing: Routing | None = None
    _base: "tuple[str, nn.Module, Tokenizer] | None" = field(default=None, repr=False)
    _nectar: "Nectar | None" = field(default=None, repr=False)

    @classmethod
    def open(cls, args: argparse.Namespace) -> "Questions | None":
        """None unless the arguments mean the library. NectarError where it has nothing to answer from."""
        if args.nectar != cli.LIBRARY:
            if args.library is not None:
                raise NectarError("--library is for `library` in the place of a .nectar")
            return None
        questions = cls(open_library(args), args)
        documents = questions.library.documents()
        if not documents:
            raise NectarError(f"the library {questions.library.folder.path} is empty: `nectar add FOLDER` fills it")
        if not any(document.file for document in documents):
            raise NectarError("no document of the library is fitted yet: `nectar update` goes on with it")
        return questions

    def start(self) -> "tuple[nn.Module, Tokenizer, Nectar]":
        """The model, and the file that was used last, to begin a conversation with: one that is not damaged."""
        ready = [document for document in self.library.documents() if document.file is not None]
        ready.sort(key=lambda document: document.used, reverse=True)
        return self._load(next((document for document in ready if document.looked_at() == document), ready[0]))

    def find(self, question: str) -> "tuple[nn.Module, Tokenizer, Nectar] | None":
        """The model and the file of the document that answers, which is named on stderr; None where none does.

        NectarError where the document has no file yet.
        """

        def likelihood(model: "nn.Module", tokenizer: Tokenizer, nectar: "Nectar") -> float:
            return nectar.log_likelihood(model, nectar.prompt(tokenizer, question))

        def first_sentence(model: "nn.Module", tokenizer: Tokenizer, nectar: "Nectar") -> str:
            return nectar.first_sentence(model, tokenizer, question)

        self.routing = self.library.route(
            question,
            evidence=lambda documents: self._behind(documents, likelihood, otherwise=math.nan),
            answers=lambda documents: self._behind(documents, first_sentence, otherwise=""),
        )
        best = self.routing.best
        if best is None:
            return None
        close = [candidate.describe() for candidate in self.routing.close]
        cli.say(f"from {best.describe()}" + (f" (close to it: {'; '.join(close)})" if close else ""))
        if best.document.file is None:
            raise NectarError(best.document.unanswered)
        loaded = self._load(best.document)
        self.document = best.document
        self.library.touch(best.document)
        return loaded

    def none(self) -> str:
        """That no document answers, in one sentence, with the nearest one."""
        return none_of(self.library.documents(), self.routing)

    def facts(self) -> JsonObject:
        """For `--json`."""
        routing = self.routing
        if routing is None:
            return {}
        candidates = [
            {
                "document": candidate.document.name,
                "path": candidate.document.as_json()["path"],
                "place": " ".join(candidate.place) if candidate.place else None,
                "score": round(candidate.score, 3),
                "log_likelihood": candidate.log_likelihood,
                "support": candidate.support,
            }
            for candidate in routing.candidates
        ]
        return {
            "document": routing.best.document.name if routing.best else None,
            "log_odds": round(routing.odds, 3) if math.isfinite(routing.odds) else None,
            "candidates": candidates,
        }

    def _load(self, document: Document, *, silent: bool = False) -> "tuple[nn.Module, Tokenizer, Nectar]":
        """silent: nothing is said of the file, which is then read again where answers come from it."""
        from . import models

        wanted = self.args.model or document.model
        if self._base is None or self._base[0] != wanted:
            identity = self.library.identity
            adapter = self.args.adapter or (identity.adapter if identity and identity.name == wanted else "")
            self._base, self._nectar = (wanted, *models.load(wanted, adapter=adapter or None, log=cli.say)), None
        if self._nectar is None or self.document is None or self.document.file != document.file:
            assert document.file is not None
            if not document.file.exists():
                raise NectarError(f"the file of {document.name} is gone: `nectar update` fits it again")
            name = f"the fitted file of {document.name}"  # the document itself is whole
            try:
                nectar = cli.load_nectar(document.file, *self._base[1:], name=name, silent=silent)
            except NectarError as error:
                if error.advice != FIT_AGAIN:
                    raise
                raise NectarError(error.message, advice="`nectar update` fits it again") from error
            if silent:
                return self._base[1], self._base[2], nectar
            self._nectar = nectar
        self.document = document
        self._nectar.about(document.name, document.number)
        return self._base[1], self._base[2], self._nectar

    def _behind(
        self, documents: Sequence[Document], look: "Callable[[nn.Module, Tokenizer, Nectar], T]", *, otherwise: T
    ) -> list[T]:
        """What is found behind documents; otherwise: for another model's, and for files that cannot be read, which are
        named."""
        found, unread = [], []
        for document in documents:
            if self._base is not None and document.model != self._base[0]:
                found.append(otherwise)
                continue
            try:
                found.append(look(*self._load(document, silent=True)))
            except NectarError as error:
                unread.append(str(error))
                found.append(otherwise)
        for line in dict.fromkeys(unread):
            cli.say(line)
        return found
