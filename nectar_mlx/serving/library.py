"""The library behind a server: each fitted document is a model, and `library` is the one that a question is about."""

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ..core.types import JsonObject
from ..errors import NectarError
from ..library import Document, Library, Routing, none_of
from ..library.database import shown
from ..mlxlm import prompts
from ..retrieval.first_sentence import LONGEST, cut
from ..retrieval.fitted_text import About
from .engine import Busy, Engine
from .job import Event, Failed, Finished, Job, Ticket, Written
from .shelf import UnknownModel

T = TypeVar("T")
LIBRARY = "library"  # the model that stands for all documents
_EARLIER = 8  # questions of a conversation that are looked at


@dataclass(frozen=True)
class Target:
    """Where an answer is from. name: the model. facts: what the reply says of it. said: the whole answer, where no
    document has one. about: the document whose passages its sources are, of those in one file."""

    name: str
    facts: JsonObject = field(default_factory=dict)
    said: str | None = None
    about: About = field(default_factory=About)


class ServedLibrary:
    """May be used from several threads; `engine` must have started."""

    def __init__(self, library: Library, engine: Engine):
        self.library, self._engine = library, engine
        self._named: dict[str, Document] = {}  # as they were found last

    def refresh(self) -> dict[str, Document]:
        """All documents by the names under which they are served. Those that are fitted become the server's models."""
        self._named = named = names(self.library.documents())
        ready = {name: document.file for name, document in named.items() if document.state == "ready"}
        files = {name: file for name, file in ready.items() if file is not None}
        if files != self._engine.shelf.files:
            result(self._engine, self._engine.call(lambda: self._engine.shelf.replace(files)))
        return named

    def warm(self) -> None:
        """Makes the documents models, and begins to read the one that was asked last."""
        ready = {name: document for name, document in self.refresh().items() if name in self._engine.shelf.files}
        if ready:
            last = max(ready, key=lambda name: ready[name].used)
            self._engine.call(lambda: self._engine.shelf.get(last))

    async def find(self, questions: Sequence[str]) -> Target:
        """The document that a conversation is about: that of its last question, or of the nearest one before that names
        one. NectarError where that document has no file yet."""
        return await asyncio.to_thread(self._find, questions[:_EARLIER])

    async def about(self, name: str) -> About:
        """The document that is served under a name, as it was found last; UnknownModel where its file is gone since, or
        where it has none to answer from."""
        document = self._named.get(name)
        if document is None or document.file is None or not document.file.exists():
            document = (await asyncio.to_thread(self.refresh)).get(name)
        if document is not None and name not in self._engine.shelf.files:
            raise UnknownModel(document.unanswered)
        return About() if document is None else About(document.name, document.number)

    def _find(self, questions: Sequence[str]) -> Target:
        named = self.refresh()
        of = {document.path: name for name, document in named.items()}
        first: Routing | None = None
        for question in questions:
            routing = self.library.route(
                question,
                evidence=partial(self._likelihoods, question, of),
                answers=partial(self._first_sentences, question, of),
            )
            first = first or routing
            if routing.best is not None:
                return self._target(routing, of, still=routing is not first)
        return Target(LIBRARY, {"document": None}, none_of([*named.values()], first))

    def _target(self, routing: Routing, of: Mapping[bytes, str], *, still: bool) -> Target:
        """still: whether it is that of an earlier question."""
        assert routing.best is not None
        document, name = routing.best.document, of.get(routing.best.document.path, "")
        if name not in self._engine.shelf.files:
            raise NectarError(document.unanswered)
        self.library.touch(document)
        place = " ".join(routing.best.place) if routing.best.place else None
        close = [of[candidate.document.path] for candidate in routing.close if candidate.document.path in of]
        facts: JsonObject = {"document": name, "place": place, "close": close, "still": still}
        return Target(name, facts, about=About(document.name, document.number))

    def _likelihoods(self, question: str, of: Mapping[bytes, str], documents: Sequence[Document]) -> list[float]:
        """How likely a question is behind documents, one after the other between the engine's steps."""
        shelf = self._engine.shelf

        def look(name: str) -> float:
            nectar = shelf.get(name)
            return nectar.log_likelihood(shelf.model, nectar.prompt(shelf.tokenizer, question))

        found = []
        for document in documents:
            try:
                likelihood = self._engine.call(partial(look, of.get(document.path, "")))
                found.append(result(self._engine, likelihood))
            except NectarError:
                found.append(math.nan)
        return found

    def _first_sentences(self, question: str, of: Mapping[bytes, str], documents: Sequence[Document]) -> list[str]:
        """What is answered behind documents: jobs among the others', which the engine batches."""
        prompt = result(
            self._engine, self._engine.call(partial(prompts.prompt, self._engine.shelf.tokenizer, question))
        )
        answers = [self._answer(of.get(document.path, ""), question, prompt) for document in documents]
        found = []
        for answer in answers:
            try:
                found.append(cut(result(self._engine, answer)))
            except NectarError:
                found.append("")
        return found

    def _answer(self, name: str, question: str, prompt: Sequence[int]) -> "Future[str]":
        """The likeliest answer's first tokens."""
        future: Future[str] = Future()
        parts: list[str] = []

        def deliver(event: Event) -> None:
            if isinstance(event, Written):
                parts.append(event.text)
            elif isinstance(event, Finished):
                future.set_result("".join(parts))
            elif isinstance(event, Failed):
                future.set_exception(event.error)

        job = Job(name=name, prompt=prompt, questions=[question], max_tokens=LONGEST, recall=False)
        self._engine.submit(Ticket(job, deliver))
        return future


def result(engine: Engine, future: "Future[T]") -> T:
    """What the engine computes; Busy where it has ended."""
    while engine.alive:
        try:
            return future.result(0.5)
        except TimeoutError:
            if future.done():
                raise
    raise Busy


def names(documents: Sequence[Document]) -> dict[str, Document]:
    """Each document by its name; by its path where others have that name, or where it is `library`."""
    count = Counter(document.name for document in documents)
    found: dict[str, Document] = {}
    for document in documents:
        name = document.name if count[document.name] == 1 and document.name != LIBRARY else shown(document.path)
        while name in found:  # paths that are shown alike
            name += "\N{REPLACEMENT CHARACTER}"
        found[name] = document
    return found
