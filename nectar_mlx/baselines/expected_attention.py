"""Expected attention (arXiv 2510.00636): a key's expected attention under Gaussian queries, times its value's norm.

E exp(q·k scale) = exp(scale μ·k + scale² kᵀΣk / 2) for q ~ N(μ, Σ). The published method estimates the Gaussian from
the text's own queries, rotated to later positions; here it is estimated from the queries of self-study answers.
"""

import mlx.core as mx

from .base import Baseline, EvalContext, View


def expected(ctx: EvalContext, nbytes: int) -> View:
    return ctx.keep_best(lambda layer: _scores(ctx, layer), nbytes)


def _scores(ctx: EvalContext, layer: int) -> mx.array:
    """The logarithm of the expected attention of each key, averaged over the group's query heads, [K, n]."""
    g = ctx.geometry
    group, (keys, values) = g.n_heads // g.n_kv_heads, ctx.layer(layer)
    samples = ctx.captured(layer).queries.astype(mx.float32)
    keys = keys.astype(mx.float32) + ctx.offset(layer)[:, None]  # absolute keys: their norm counts here
    scores = []
    for member in range(group):  # a token has one sample a query head of the group, side by side
        queries = samples[:, member::group]
        mean = queries.mean(1, keepdims=True)
        centred = queries - mean
        covariance = centred.swapaxes(1, 2) @ centred / centred.shape[1]
        score = g.scale * (keys @ mean.swapaxes(1, 2))[..., 0]
        score = score + 0.5 * g.scale**2 * ((keys @ covariance) * keys).sum(-1)
        scores.append(score - mx.logsumexp(score, axis=1, keepdims=True))
    size = mx.log(mx.linalg.norm(values.astype(mx.float32), axis=-1) + 1e-6)
    return mx.logsumexp(mx.stack(scores), axis=0) + ctx.bias(layer) + size


BASELINES = (Baseline(name="expected attention", build=expected),)
