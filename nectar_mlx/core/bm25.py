"""BM25 (Robertson and Zaragoza, 2009): which passages share most words with a question."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .types import Tokenizer
from .words import words

_K1, _B = 1.2, 0.75  # how soon a repeated word counts no more; how much a passage's length counts
PASSAGE = 64  # tokens of a passage


@dataclass(frozen=True)
class Index:
    """Passages of token ids and how often each has which word. phrase: so many words in a row count as a word too."""

    passages: list[list[int]]
    counts: list[Counter[str]]
    phrase: int = 1

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Sequence[int], *, passage: int = PASSAGE, phrase: int = 1) -> "Index":
        """Cuts ids into passages of so many tokens."""
        passages = [list(ids[i : i + passage]) for i in range(0, len(ids), passage)]
        return cls(passages, [Counter(words(tokenizer.decode(p), phrase=phrase)) for p in passages], phrase)

    @classmethod
    def joined(cls, indices: Sequence["Index"]) -> "Index":
        """The passages of all of them, in order."""
        passages = [passage for index in indices for passage in index.passages]
        counts = [counter for index in indices for counter in index.counts]
        return cls(passages, counts, indices[0].phrase)

    @property
    def vocabulary(self) -> set[str]:
        """Every word of every passage."""
        return {word for counter in self.counts for word in counter}

    def scores(self, question: str, *, without: Collection[str] = ()) -> list[float]:
        """BM25 of every passage; without: words that do not count."""
        mean = sum(counter.total() for counter in self.counts) / len(self.counts) or 1.0  # of texts without a word
        weights = {}
        for word in set(words(question, phrase=self.phrase)).difference(without):
            frequency = sum(word in counter for counter in self.counts)
            weights[word] = math.log(1 + (len(self.counts) - frequency + 0.5) / (frequency + 0.5))
        scores = []
        for counter in self.counts:
            length = _K1 * (1 - _B + _B * counter.total() / mean)
            scores.append(sum(v * counter[w] * (_K1 + 1) / (counter[w] + length) for w, v in weights.items()))
        return scores

    def best(self, question: str, count: int) -> list[int]:
        """The ids of the best passages, in the order of the text."""
        scores = self.scores(question)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
        return [token for i in sorted(order) for token in self.passages[i]]
