"""Recall: where an answer quotes the text, the text says how it goes on.

A small file loses the wording first, yet it holds the text's tokens. Where the last m >= SHORTEST tokens of a
conversation stand in the text, the tokens that follow them there are likely to come next:

    p = (1 - w) p_model + w p_copy,    w = weight · c^exponent,    c = Σ p_copy p_model / Σ p_copy²

a mixture as in pointer networks (arXiv 1506.03134), the copy from exact matches. c is the model's own probability of
what the text says next: a file that knows the text well tells where an answer leaves it. Weight and exponent are
chosen while fitting, against the full cache; a file close to the text gets the weight 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..core.exp import log_sum_exp
from ..core.gather import take
from ..core.types import DoubleArray, JsonObject

SHORTEST = 8  # tokens of a match; shorter ones are names and phrases, after which the text is no guide
_LEAST = 1e-12  # a probability
_ENOUGH = 32  # tokens that match, to choose weights by
WEIGHTS = (0.0, 0.5, 0.8, 0.9, 0.95)
EXPONENTS = (0.0, 0.1, 0.25, 0.5, 1.0)


class Copy(NamedTuple):
    """What comes next by the text: tokens [c] and their probabilities [c], of what follows the longest match."""

    tokens: npt.NDArray[np.int32]
    probabilities: DoubleArray


class Matcher:
    """Follows one conversation. A token takes one pass over the text's ids."""

    def __init__(self, prefix: Sequence[int]):
        self._ids = np.asarray(prefix, dtype=np.int32)
        self._lengths = np.zeros(len(self._ids), dtype=np.int32)  # of the match that ends at each position

    def feed(self, token: int) -> None:
        """The conversation goes on with a token."""
        longer = np.ones_like(self._lengths)
        longer[1:] += self._lengths[:-1]
        self._lengths = np.where(self._ids == token, longer, 0)

    def copy(self) -> Copy | None:
        """None where no match is long enough, or the text ends there."""
        followed = self._lengths[:-1]
        longest = followed.max(initial=0)
        if longest < SHORTEST:
            return None
        tokens, counts = np.unique(self._ids[1:][followed == longest], return_counts=True)
        return Copy(tokens, counts / counts.sum())


@dataclass(frozen=True)
class Recall:
    """How much of a copy counts; `weight` in [0, 1), 0 for none of it. exponent >= 0."""

    weight: float
    exponent: float

    @classmethod
    def of(cls, report: JsonObject) -> Self:
        """As a file's report says; none where it does not."""
        said = report.get("recall")
        weight, exponent = (said.get("weight"), said.get("exponent")) if isinstance(said, dict) else (None, None)
        if not isinstance(weight, int | float) or not isinstance(exponent, int | float):
            return cls(0.0, 0.0)
        return cls(float(weight), float(exponent)) if 0 <= weight < 1 and 0 <= exponent < np.inf else cls(0.0, 0.0)

    def weigh(self, copy: Copy, model: DoubleArray) -> float:
        """w, where the model's probabilities of the copy's tokens are model [c]."""
        agreement = (copy.probabilities * model).sum() / np.square(copy.probabilities).sum()
        return float(self.weight * min(max(agreement, _LEAST), 1.0) ** self.exponent)

    def mixed(self, logits: mx.array, copy: Copy) -> mx.array:
        """Logits [V] of the mixture, normalized."""
        logits = logits.astype(mx.float32)
        log_p, tokens = logits - mx.logsumexp(logits), mx.array(copy.tokens)
        weight = self.weigh(copy, np.exp(np.array(log_p[tokens], np.float64)))
        mixed = log_p + float(np.log1p(-weight))
        mixed[tokens] = mx.logaddexp(mixed[tokens], mx.array(np.log(weight * copy.probabilities + 1e-300), mx.float32))
        return mixed

    def processor(self, prefix: Sequence[int]) -> Callable[[mx.array, mx.array], mx.array]:
        """mlx-lm's logits processor for one conversation behind the prefix: tokens [T] so far, logits [1, V]."""
        matcher, seen = Matcher(prefix), 0

        def process(tokens: Any, logits: mx.array) -> mx.array:
            nonlocal seen
            new: list[int] = tokens[seen:].tolist()
            for token in new:
                matcher.feed(token)
            seen += len(new)
            copy = matcher.copy()
            return logits if copy is None else self.mixed(logits[0], copy)[None]

        return process

    def applied(
        self, prefix: Sequence[int], prompt: Sequence[int], answer: Sequence[int], logits: mx.array
    ) -> mx.array:
        """Logits [A, V] of an answer's tokens, as the mixture has them."""
        if not self.weight:
            return logits
        rows = [
            logits[i] if copy is None else self.mixed(logits[i], copy)
            for i, copy in enumerate(copies(prefix, prompt, answer))
        ]
        return mx.stack([row.astype(mx.float32) for row in rows])


def copies(prefix: Sequence[int], prompt: Sequence[int], answer: Sequence[int]) -> list[Copy | None]:
    """What the text says before each of an answer's tokens."""
    matcher, found = Matcher(prefix), list[Copy | None]()
    for token in prompt:
        matcher.feed(token)
    for token in answer:
        found.append(matcher.copy())
        matcher.feed(token)
    return found


class Seen(NamedTuple):
    """What one answer says of the weights: its tokens, those of them that matched, and the sum of what each weight
    changes."""

    tokens: int
    matched: int
    kl: list[float]


class Calibration:
    """Chooses the weights that bring a file's answers closest to the full cache's, from both's logits."""

    def __init__(self, prefix: Sequence[int]):
        self._prefix = prefix
        self._tried = [Recall(w, e) for w in WEIGHTS for e in EXPONENTS if w or not e]
        self.seen: list[Seen] = []  # of every answer, in their order

    @property
    def _matched(self) -> int:
        return sum(seen.matched for seen in self.seen)

    @property
    def _kl(self) -> DoubleArray:
        """Sums of what each weight changes; the first is none."""
        return sum((np.array(seen.kl) for seen in self.seen), np.zeros(len(self._tried)))

    def add(self, prompt: Sequence[int], answer: Sequence[int], reference: mx.array, ours: mx.array) -> None:
        """One answer's logits [A, V], the full cache's and the file's."""
        found = {i: copy for i, copy in enumerate(copies(self._prefix, prompt, answer)) if copy is not None}
        kl = np.zeros(len(self._tried))
        if found:
            pairs = zip(_probabilities(reference, found), _probabilities(ours, found), strict=True)
            for copy, (exact, model) in zip(found.values(), pairs, strict=True):
                kl += self._changes(copy, exact, model)
        self.seen.append(Seen(len(answer), len(found), kl.tolist()))

    def _changes(self, copy: Copy, reference: DoubleArray, model: DoubleArray) -> DoubleArray:
        """By how much each of the weights changes KL(reference ‖ mixture) at one token."""
        weights = np.array([recall.weigh(copy, model) for recall in self._tried])[:, None]
        ratio = (1 - weights) + weights * copy.probabilities / np.maximum(model, _LEAST)
        others = np.log1p(-weights[:, 0]) * (1 - reference.sum())
        return np.asarray(-others - (reference * np.log(ratio)).sum(1))

    def best(self) -> Recall:
        """None of it where so few tokens matched that they may be chance."""
        return self._tried[int(self._kl.argmin()) if self._matched >= _ENOUGH else 0]

    def report(self, kl: float) -> JsonObject:
        """For a file's report. kl: of the file's answers without recall, the mean of all tokens."""
        best = self.best()
        tokens = sum(seen.tokens for seen in self.seen)
        changed = kl + float(self._kl[self._tried.index(best)]) / max(tokens, 1)
        return {
            "weight": best.weight,
            "exponent": best.exponent,
            "kl": round(max(changed, 0.0), 5),
            "matched": self._matched,
        }


def _probabilities(logits: mx.array, found: Mapping[int, Copy]) -> list[DoubleArray]:
    """Of the tokens of each copy, by its row of logits [A, V]. All at once: each would be waited for."""
    counts = [len(copy.tokens) for copy in found.values()]
    logits = take(logits, mx.array(np.fromiter(found, np.int32))).astype(mx.float32)
    rows = np.repeat(np.arange(len(found)), counts)
    places = rows * logits.shape[1] + np.concatenate([copy.tokens for copy in found.values()])
    chosen, norms = take(logits.reshape(-1), mx.array(places.astype(np.int32))), log_sum_exp(logits)
    mx.eval(chosen, norms)
    probabilities = np.exp(np.array(chosen, np.float64) - np.array(norms, np.float64)[rows])
    return np.split(probabilities, np.cumsum(counts)[:-1])
