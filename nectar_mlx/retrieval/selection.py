"""Which keys a query should read: those that take the most of the attention of any head of its group."""

from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..core.device import device
from ..core.exp import exp
from ..heads.hybrid import EVERYTHING


class Choice(NamedTuple):
    """What to read for each of N tokens of K KV heads.

    positions: [K, N, k] in the middle. scores: [K, N, G, k], as the selector estimates them. threshold: [K, N, G],
    above its estimate of the scores of all other keys.
    """

    positions: mx.array
    scores: mx.array
    threshold: mx.array

    def scaled(self, total: mx.array) -> "Choice":
        """Of shares of attention, as scores; total [K, N, G]: the log-normaliser of each head's attention."""
        return Choice(self.positions, self.scores + total[..., None], self.threshold + total)


class Selector(Protocol):
    """Finds the keys to read, for one layer. nbytes: what it keeps."""

    @property
    def nbytes(self) -> int: ...

    def step_bytes(self, count: int) -> int:
        """Bytes that it reads to choose `count` keys a KV head for one token."""

    def choose(self, queries: mx.array, anchors: mx.array, *, count: int) -> Choice:
        """The `count` keys of the largest share in any head's attention.

        queries: [K, N, G, D], of G query heads that share what is read. anchors: the log-normaliser of their exact
        anchors, [K, N, G].
        """


class Scoring:
    """A selector that scores every key."""

    @property
    def nbytes(self) -> int:
        raise NotImplementedError

    def step_bytes(self, count: int) -> int:
        return self.nbytes

    def scores(self, queries: mx.array) -> mx.array:
        """scale · q·k, exact or nearly so: queries [K, N, D] -> [K, N, n], for the n keys of the middle."""
        raise NotImplementedError

    def choose(self, queries: mx.array, anchors: mx.array, *, count: int) -> Choice:
        K, N, G, D = queries.shape
        scores = self.scores(queries.reshape(K, N * G, D)).reshape(K, N, G, -1)
        total = mx.logaddexp(log_sum(scores), anchors)
        return best(scores - total[..., None], count=count).scaled(total)


def log_sum(scores: mx.array) -> mx.array:
    """log Σ exp over the last axis."""
    top = scores.max(-1, keepdims=True)
    return top[..., 0] + mx.log(exp(scores - top).sum(-1))


def best(shares: mx.array, *, count: int) -> Choice:
    """The `count` keys of the largest share in any head's attention; shares: logarithms, [K, N, G, n].

    A head's threshold lies between the shares of the last key chosen and the first one not.
    """
    n = shares.shape[-1]
    if count >= n:
        positions = mx.broadcast_to(mx.arange(n), (*shares.shape[:2], n))
        return Choice(positions, shares, mx.full(shares.shape[:3], -EVERYTHING))
    largest = shares.max(2)
    order = top(largest, count + 1)
    chosen = order[..., :count]
    last, first = [mx.take_along_axis(largest, x, axis=-1).min(-1) for x in (chosen, order[..., count:])]
    scores = mx.take_along_axis(shares, chosen[:, :, None], axis=-1)
    return Choice(chosen, scores, mx.broadcast_to(((last + first) / 2)[..., None], shares.shape[:3]))


def top(x: mx.array, count: int) -> mx.array:
    """Indices of the `count` largest along the last axis, the smallest of them last."""
    if not device().linux_cpu:
        return mx.argpartition(-x, count - 1, axis=-1)[..., :count]
    indices = np.argpartition(-np.array(x), count - 1, axis=-1)  # MLX sorts them all there
    return mx.array(indices[..., :count].astype(np.int32))
