"""Expected attention (arXiv 2510.00636): what a key can expect from a Gaussian of queries, times its value's size.

E exp(q·k scale) = exp(scale μ·k + scale² kᵀΣk / 2) for q ~ N(μ, Σ). The published method guesses the Gaussian from the
text's own queries, turned to later positions; here it is that of the queries of studied answers, where they are asked.
"""

import mlx.core as mx

from .base import Baseline, EvalContext, View


def expected(task: EvalContext, nbytes: int) -> View:
    return task.keep_best(lambda layer: _scores(task, layer), nbytes)


def _scores(task: EvalContext, layer: int) -> mx.array:
    """The logarithm of the expected attention of each key, averaged over the group's query heads, [K, n]."""
    g = task.geometry
    group, (keys, values) = g.n_heads // g.n_kv_heads, task.layer(layer)
    rows = task.captured(layer).queries.astype(mx.float32)
    keys = keys.astype(mx.float32) + task.offset(layer)[:, None]  # the size of a key counts here
    found = []
    for member in range(group):  # rows of one token lie side by side, one for each query head of the group
        queries = rows[:, member::group]
        mean = queries.mean(1, keepdims=True)
        centred = queries - mean
        covariance = centred.swapaxes(1, 2) @ centred / centred.shape[1]
        score = g.scale * (keys @ mean.swapaxes(1, 2))[..., 0]
        score = score + 0.5 * g.scale**2 * ((keys @ covariance) * keys).sum(-1)
        found.append(score - mx.logsumexp(score, axis=1, keepdims=True))
    size = mx.log(mx.linalg.norm(values.astype(mx.float32), axis=-1) + 1e-6)
    return mx.logsumexp(mx.stack(found), axis=0) + task.bias(layer) + size


BASELINES = (Baseline(name="expected attention", build=expected),)
