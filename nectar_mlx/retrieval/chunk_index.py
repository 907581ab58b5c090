"""Which chunk of a text a question is about, by its words: BM25 over passages, without a model."""

from collections import Counter
from collections.abc import Sequence
from heapq import nlargest
from itertools import islice

from ..core.bm25 import Index
from ..core.types import Tokenizer

_PHRASE = 3  # words of the longest phrase that counts as a word
_BEST = 3  # passages of a chunk that count


class ChunkIndex:
    """The passages of several chunks. Words and phrases that more than half of the chunks have do not count."""

    def __init__(self, tokenizer: Tokenizer, chunks: Sequence[Sequence[int]]):
        """chunks: each one's token ids."""
        indices = [Index.of(tokenizer, chunk, phrase=_PHRASE) for chunk in chunks]
        frequencies = Counter(word for index in indices for word in index.vocabulary)
        self._common = {word for word, count in frequencies.items() if 2 * count > len(indices)}
        self._counts = [len(index.passages) for index in indices]
        self._passages = Index.joined(indices)

    def nearest(self, question: str) -> int | None:
        """The number of the chunk whose best passages score highest; None where no word of the question counts."""
        passages = iter(self._passages.scores(question, without=self._common))
        scores = [sum(nlargest(_BEST, islice(passages, count))) for count in self._counts]
        best = max(scores, default=0)
        return scores.index(best) if best > 0 else None
