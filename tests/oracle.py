"""Attention in float64 numpy: what every implementation is compared with."""

import numpy as np


def attention(queries, keys, values, *, scale, bias=None, mask=None):
    """queries [..., N, D], keys and values [..., S, D] -> output [..., N, D], log-normaliser [..., N]; mask True =
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
