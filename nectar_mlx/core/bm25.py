"""BM25 (Robertson and Zaragoza, 2009): which passages share most words with a question."""

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

_K1, _B = 1.2, 0.75
PASSAGE = 64  # tokens, about


@dataclass(frozen=True)
class Index:
    """Passages of token ids with their words, scored against a question. run: phrases of up to so many words count as
    words too."""

    passages: list[list[int]]
    words: list[Counter[str]]
    run: int = 1

    @classmethod
    def of(cls, tokenizer: Any, ids: Sequence[int], *, passage: int = PASSAGE, run: int = 1) -> "Index":
        """Cuts ids into passages of so many tokens."""
        cut = [list(ids[i : i + passage]) for i in range(0, len(ids), passage)]
        return cls(cut, [Counter(words(tokenizer.decode(p), run=run)) for p in cut], run)

    @classmethod
    def joined(cls, indices: Sequence["Index"]) -> "Index":
        """The passages of all of them, in order."""
        passages, said = ([x for i in indices for x in getattr(i, name)] for name in ("passages", "words"))
        return cls(passages, said, indices[0].run)

    @property
    def vocabulary(self) -> set[str]:
        """Every word that a passage says."""
        return {word for said in self.words for word in said}

    def scores(self, question: str, *, without: Collection[str] = ()) -> list[float]:
        """BM25 of every passage; without: words that do not count."""
        mean = sum(w.total() for w in self.words) / len(self.words)
        weights = {}
        for word in set(words(question, run=self.run)).difference(without):
            holding = sum(word in w for w in self.words)
            weights[word] = math.log(1 + (len(self.words) - holding + 0.5) / (holding + 0.5))
        found = []
        for said in self.words:
            length = _K1 * (1 - _B + _B * said.total() / mean)
            found.append(sum(v * said[w] * (_K1 + 1) / (said[w] + length) for w, v in weights.items()))
        return found

    def best(self, question: str, count: int) -> list[int]:
        """The ids of the best passages, in the order of the text."""
        scores = self.scores(question)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
        return [token for i in sorted(order) for token in self.passages[i]]


def words(text: str, *, run: int = 1) -> list[str]:
    """The words of a text, and its phrases of up to `run` words."""
    single = re.findall(r"\w+", text.lower())
    return [" ".join(single[i : i + n]) for n in range(1, run + 1) for i in range(len(single) - n + 1)]
