"""Attention Matching in closed form (arXiv 2602.16284): the context's own keys, reweighted, with values solved for.

Per head: keep the m keys with the largest root-mean-square attention over the queries; biases by non-negative least squares, so
that the kept keys carry the context's whole mass; values by least squares, so that they give its output. A baseline, and the
start of every quadrature.
"""

from collections.abc import Sequence

import mlx.core as mx

from ._exp import exp
from .heads import HeadArrays
from .queries import Captured

_RIDGE = 1e-4  # relative to the mean diagonal: the Gram matrices of peaked heads are close to singular
_NNLS_STEPS = 300


def attention_weights(rows: Captured, keys: mx.array, *, scale: float) -> mx.array:
    """The exact softmax weights of rows [M, N, D] on keys [M, S, D] -> [M, N, S], float32."""
    scores = (rows.queries.astype(mx.float32) * scale) @ keys.astype(mx.float32).swapaxes(1, 2)
    return exp(scores - rows.log_normalizer[..., None])


def importance(rows: Captured, keys: mx.array, *, scale: float, chunk: int = 512) -> mx.array:
    """Root-mean-square attention that each key of [M, n, D] receives from the rows -> [M, n]."""
    total = mx.zeros(keys.shape[:2])
    count = rows.queries.shape[1]
    for start in range(0, count, chunk):
        part = Captured(*(x[:, start : start + chunk] for x in rows))
        total = total + mx.square(attention_weights(part, keys, scale=scale)).sum(1)
        mx.eval(total)
    return mx.sqrt(total / count)


def most_important(weights: mx.array, count: int) -> mx.array:
    """Indices of the `count` largest of weights [n], in the order of the text."""
    return mx.sort(mx.argpartition(-weights, count - 1)[:count])


def match(
    rows: Captured, keys: mx.array, values: mx.array, chosen: Sequence[mx.array], *, scale: float
) -> list[HeadArrays]:
    """Nodes of M heads from the chosen keys of each.

    rows: queries and outputs [M, N, D]; keys, values [M, n, D]; chosen: M index arrays [m_i] -> M quadrature heads.
    """
    heads = []
    for i, index in enumerate(chosen):
        own = Captured(*(x[i : i + 1] for x in rows))
        k, v = keys[i][index].astype(mx.float32), values[i][index].astype(mx.float32)
        weights = attention_weights(own, k[None], scale=scale)[0]
        mass = _nonnegative(weights)
        shares = weights * mass
        shares = shares / shares.sum(1, keepdims=True)
        values_fit = _ridge(shares, own.output[0].astype(mx.float32), towards=v)
        heads.append({"keys": k, "values": values_fit, "bias": mx.log(mass)})
        mx.eval(heads[-1])
    return heads


def _nonnegative(weights: mx.array) -> mx.array:
    """argmin over w >= 0 of |weights · w - 1|², by accelerated projected gradient; weights [N, m] -> [m], kept above 1e-4."""
    gram, ones = weights.T @ weights, weights.sum(0)
    step = 1 / _largest_eigenvalue(gram)
    w = y = mx.ones_like(ones)
    t = 1.0
    for i in range(_NNLS_STEPS):
        following = mx.maximum(y - step * (gram @ y - ones), 0)
        t_following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y, w, t = following + (t - 1) / t_following * (following - w), following, t_following
        if i % 50 == 0:
            mx.eval(w, y)
    return mx.maximum(w, 1e-4)


def _largest_eigenvalue(gram: mx.array) -> mx.array:
    """An upper estimate by power iteration; the matrix has non-negative entries, so the start is near the first eigenvector."""
    v = mx.ones(gram.shape[0])
    for _ in range(20):
        v = gram @ v
        v = v / mx.linalg.norm(v)
    return 1.05 * mx.linalg.norm(gram @ v)


def _ridge(shares: mx.array, outputs: mx.array, *, towards: mx.array) -> mx.array:
    """argmin over V of |shares · V - outputs|² + ridge · |V - towards|²; shares [N, m], outputs [N, D] -> [m, D]."""
    gram = shares.T @ shares
    ridge = _RIDGE * mx.diag(gram).mean()
    left = gram + ridge * mx.eye(gram.shape[0])
    return mx.linalg.solve(left, shares.T @ outputs + ridge * towards, stream=mx.cpu)
