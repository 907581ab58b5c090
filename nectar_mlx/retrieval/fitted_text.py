"""The text that a file stands for, as questions see it: its chunks, its passages, and the sources of an answer."""

from dataclasses import replace
from typing import NamedTuple

from ..core.types import DoubleArray, JsonObject, Tokenizer
from ..documents import Reading
from ..mlxlm import prompts
from ..store import text as kept_text
from ..store.chunking import ChunkedPrefix
from . import sources
from .chunk_index import ChunkIndex
from .passages import Passages
from .sources import Source


class About(NamedTuple):
    """The document that answers are about. name: what it is called today. number: its place (from 0) among those that
    the text was made of; None where the name tells."""

    name: str = ""
    number: int | None = None


class FittedText:
    """ids: the prefix, with its chunks. report: of the file; it tells of the documents. name: of the text, where the
    report tells of none. chunk: the one that a file of one chunk stands for; `ids` are the whole text's all the same.

    A file belongs to one tokenizer: what is made with the first one is kept.
    """

    def __init__(self, ids: ChunkedPrefix, report: JsonObject, *, name: str, chunk: int | None = None):
        self.ids, self._report, self._name, self._chunk = ids, report, name, chunk
        self.about = About()  # sources name no other document where the text holds this one
        self._index: ChunkIndex | None = None
        self._passages: Passages | None = None

    def of_chunk(self, chunk: int) -> "FittedText":
        made = FittedText(self.ids, self._report, name=self._name, chunk=chunk)
        made.about = self.about
        return made

    def reading(self, tokenizer: Tokenizer) -> Reading:
        """The text with its documents and their places. NectarError if what the file holds of them is damaged."""
        return kept_text.kept(self._report, tokenizer, self.ids.ids, name=self._name)

    def passages(self, tokenizer: Tokenizer) -> Passages:
        if self._passages is None:
            self._passages = Passages(self.reading(tokenizer))
        return self._passages

    def sources(
        self,
        tokenizer: Tokenizer,
        question: str,
        answer: str,
        *,
        attention: DoubleArray | None,
        chunk: int | None,
        count: int,
    ) -> list[Source]:
        """As `Nectar.sources`. attention: of `HybridContext.attended`."""
        chunk = chunk if self._chunk is None else self._chunk
        passages = self.passages(tokenizer)
        within = None if chunk is None else self._characters(tokenizer, chunk)
        name, number = self.about
        files = [f for n, f in enumerate(passages.reading.files) if (f.name == name if number is None else n == number)]
        one = files[0] if len(files) == 1 else None
        if one is not None:
            start, end = within or (one.start, one.end)
            within = max(start, one.start), min(end, one.end)
        found = sources.find(passages, question, answer, attention=attention, within=within, count=count)
        return found if one is None else [replace(source, document=name) for source in found]

    def nearest(self, tokenizer: Tokenizer, question: str) -> int | None:
        """The number of the chunk that a question is about, by its words; None where no word tells."""
        if self._index is None:
            self._index = ChunkIndex(tokenizer, [self.ids.body(n) for n in range(len(self.ids.lengths))])
        return self._index.nearest(question)

    def _characters(self, tokenizer: Tokenizer, chunk: int) -> tuple[int, int]:
        """Where a chunk starts and ends in the text."""
        start, end = (len(prompts.document(tokenizer, self.ids.ids[:at])) for at in self.ids.bounds(chunk))
        return start, end
