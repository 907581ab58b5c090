"""What every implementation is compared with: attention in float64 numpy, and exact scores of all keys."""

import mlx.core as mx
import numpy as np

from nectar_mlx.retrieval.selection import Scoring


def attention(queries, keys, values, *, scale, bias=None, mask=None):
    """queries [..., N, D], keys and values [..., S, D] -> output [..., N, D], log-normalizer [..., N]; mask True =
    visible.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (queries, keys, values))
    scores = scale * q @ np.swapaxes(k, -1, -2)
    if bias is not None:
        scores = scores + np.asarray(bias, dtype=np.float64)[..., None, :]
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights @ v / total, (top + np.log(total))[..., 0]


def repeat_heads(x, n_heads):
    """[B, K, S, D] -> [B, H, S, D]: each KV head once for every query head of its group."""
    return np.repeat(np.asarray(x), n_heads // x.shape[1], axis=1)


class Selector(Scoring):
    """A selector that knows every key [K, n, D]."""

    def __init__(self, keys, *, scale):
        self._keys, self._scale = keys.astype(mx.float32), scale

    @property
    def nbytes(self):
        return self._keys.size * 2

    def scores(self, queries):
        return (queries.astype(mx.float32) * self._scale) @ self._keys.swapaxes(1, 2)
