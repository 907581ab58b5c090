"""Which keys a query should read: those that take the most of the attention of any head of its group."""

from typing import NamedTuple, Protocol

import mlx.core as mx

from .._exp import exp
from ..heads.residual import EVERYTHING


class Selector(Protocol):
    """Scores of keys that need not be exact, for one layer."""

    @property
    def nbytes(self) -> int:
        """Bytes that one step reads to score all keys of all heads."""

    def scores(self, queries: mx.array) -> mx.array:
        """scale · q·k, exact or nearly so: queries [K, N, D] -> [K, N, n], for the n keys of the middle."""


class Oracle:
    """Exact scores, which take every key [K, n, D]: what other selectors are compared with."""

    def __init__(self, keys: mx.array, *, scale: float):
        self._keys, self._scale = keys.astype(mx.float32), scale

    @property
    def nbytes(self) -> int:
        return self._keys.size * 2

    def scores(self, queries: mx.array) -> mx.array:
        return (queries.astype(mx.float32) * self._scale) @ self._keys.swapaxes(1, 2)


class Choice(NamedTuple):
    """positions [K, N, count] in the middle, and each query head's threshold [K, N, G]."""

    positions: mx.array
    threshold: mx.array


def choose(scores: mx.array, anchors: mx.array, *, count: int) -> Choice:
    """The `count` keys of the largest share in any head's attention.

    scores: [K, N, G, n], of G query heads that share what is read. anchors: the log-normaliser of their exact anchors,
    [K, N, G]. A head's threshold lies between the shares of the last key chosen and the first one not, as a score.
    """
    if count >= scores.shape[-1]:
        every = mx.broadcast_to(mx.arange(scores.shape[-1]), (*scores.shape[:2], scores.shape[-1]))
        return Choice(every, mx.full(scores.shape[:3], -EVERYTHING))
    top = scores.max(-1, keepdims=True)
    total = mx.logaddexp(top[..., 0] + mx.log(exp(scores - top).sum(-1)), anchors)
    shares = (scores - total[..., None]).max(2)
    order = mx.argpartition(-shares, count, axis=-1)
    ends = [mx.take_along_axis(shares, x, axis=-1).min(-1) for x in (order[..., :count], order[..., count : count + 1])]
    return Choice(order[..., :count], ((ends[0] + ends[1]) / 2)[..., None] + total)
