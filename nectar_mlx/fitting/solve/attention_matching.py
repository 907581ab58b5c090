"""Attention Matching in closed form (arXiv 2602.16284): the context's own keys, reweighted, with values solved for.

Per head: keep the m keys with the largest root-mean-square attention over the queries; biases by non-negative least
squares, so that the kept keys carry the context's whole mass; values by least squares, so that they give its output.
A baseline, and the start of every quadrature.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ...core.device import device
from ...core.exp import exp, exp_of_scores, sigmoid
from ...heads import Bank, HeadArrays
from ..samples.sample_store import Samples

_RIDGE = 1e-2  # relative to the mean diagonal: a head of many nodes would fit its samples and nothing else
_LEAST_SHARE = 1e-2  # added to squared shares: samples in which a context hardly counts tell a little of it, too
_NNLS_STEPS = 300
_RIDGE_STEPS = 48
_SCORE_ARRAYS = 4  # as large as the scores, that `costs` holds at the same time


def attention_weights(samples: Samples, keys: mx.array, *, scale: float, bias: mx.array | None = None) -> mx.array:
    """The exact softmax weights of samples [M, N, D] on keys [M, S, D] -> [M, N, S], float32. bias [M, S]: of scores.

    A score never exceeds its log-normalizer; where the two were computed in different ways it may by a rounding error,
    which would be a factor.
    """
    scores = scale * (samples.queries.astype(mx.float32) @ keys.astype(mx.float32).swapaxes(1, 2))
    if bias is not None:
        scores = scores + bias[:, None]
    return exp(mx.minimum(scores - samples.log_normalizer[..., None], 0.0))


def importance(
    samples: Samples, keys: mx.array, *, scale: float, bias: mx.array | None = None, by_share: bool = False
) -> mx.array:
    """Root-mean-square attention that each key of [M, n, D] receives -> [M, n]. bias [M, n]: as above. by_share: as for
    `match`."""
    total, counts = mx.zeros(keys.shape[:2]), _counts(samples, by_share)
    for part, count in _parts(samples, total.size, counts):
        total = total + mx.square(_counted(attention_weights(part, keys, scale=scale, bias=bias), count)).sum(1)
        mx.eval(total)
    return mx.sqrt(total / samples.queries.shape[1])


def costs(samples: Samples, bank: Bank) -> HeadArrays:
    """What an error of 1 in one number of a node's key or value adds to the squared error of a bank's merged output, on
    average over the samples: {"keys", "values"} [M, m]. A value's counts by the square of its share of the output, a
    key's also by its value's distance from the output, and by the queries' mean square about their mean: what errs
    alike for all queries is the bias's."""
    p = bank.parameters
    keys, values, bias = (p[name].astype(mx.float32) for name in ("keys", "values", "bias"))
    square = mean_squares(samples.queries, centered=True).mean(1) * bank.scale**2
    shares, by_output = mx.zeros((*bias.shape, 1)), mx.zeros((*values.shape[:2], values.shape[2] + 1))
    for part, _ in _parts(samples, _SCORE_ARRAYS * bias.size):
        scores = bank.scale * part.queries.astype(mx.float32) @ keys.swapaxes(1, 2) + bias[:, None]
        weights, top, total = exp_of_scores(scores)
        gate = sigmoid((top + mx.log(total)) - part.live_log_normalizer[..., None])
        merged = gate * ((weights @ values) / total) + (1 - gate) * part.live_output
        share = mx.square(weights * (gate / total)).swapaxes(1, 2)
        shares = shares + share.sum(-1, keepdims=True)
        by_output = by_output + share @ mx.concatenate([merged, mx.square(merged).sum(-1, keepdims=True)], axis=-1)
        mx.eval(shares, by_output)
    # The squared distances |merged|² - 2 merged · v + |v|², each times its share, of all samples together.
    far = by_output[..., -1] + (values * (values * shares - 2 * by_output[..., :-1])).sum(-1)
    count = samples.queries.shape[1]
    return {"keys": mx.maximum(far, 0) * square[:, None] / count, "values": shares[..., 0] / count}


def mean_squares(queries: mx.array, *, centered: bool = False) -> mx.array:
    """The mean square of each coordinate of queries [M, N, D], about zero or about their mean -> [M, D]."""
    squares = []
    for m in range(queries.shape[0]):  # one by one: all at once would be there twice
        head = queries[m, :].astype(mx.float32)
        squares.append(mx.square(head - head.mean(0) if centered else head).mean(0))
        mx.eval(squares[-1])
    return mx.stack(squares)


def _parts(samples: Samples, scores: int, counts: mx.array | None = None) -> Iterator[tuple[Samples, mx.array | None]]:
    """Samples, so many at a time that there is room for the scores, and their counts; scores: of one row of all
    heads."""
    step = max(1, device().max_scores // scores)
    for start in range(0, samples.queries.shape[1], step):
        part = slice(start, start + step)
        yield samples.some(part), None if counts is None else counts[:, part]


def _counts(samples: Samples, by_share: bool) -> mx.array | None:
    """How much each sample's errors count, [M, N, 1]; None where all count alike."""
    if not by_share:
        return None
    share = mx.square(sigmoid(samples.log_normalizer - samples.live_log_normalizer))
    return mx.sqrt(share / mx.maximum(share.mean(1, keepdims=True), 1e-30) + _LEAST_SHARE)[..., None]


def _counted(rows: mx.array, counts: mx.array | None) -> mx.array:
    """Rows [M, N, ...] of samples, as much as these count."""
    return rows if counts is None else counts * rows


def most_important(weights: mx.array, count: int) -> mx.array:
    """Indices of the `count` largest of weights [n], in the order of the text."""
    return mx.sort(mx.argpartition(-weights, count - 1)[:count])


def match(
    samples: Samples, keys: Sequence[mx.array], values: Sequence[mx.array], *, scale: float, by_share: bool = False
) -> list[HeadArrays]:
    """Nodes of M heads from chosen keys of each.

    samples: queries and outputs [M, N, D]; keys and values: M arrays [m_i, D], the chosen ones -> M quadrature heads.
    by_share: whether an error counts as in the merged output, by the context's share of it.
    """
    counts = _counts(samples, by_share)
    count = max(k.shape[0] for k in keys)
    padded = mx.stack([mx.pad(k.astype(mx.float32), [(0, count - k.shape[0]), (0, 0)]) for k in keys])
    alive = mx.stack([mx.arange(count) < k.shape[0] for k in keys])
    gram, ones = mx.zeros((*alive.shape, count)), mx.zeros((*alive.shape, 1))
    right = mx.zeros((*alive.shape, values[0].shape[1]))
    for part, by in _parts(samples, alive.size, counts):
        weights = _counted(attention_weights(part, padded, scale=scale), by) * alive[:, None]
        gram, ones = mx.addmm(gram, weights.swapaxes(1, 2), weights), ones + _counted(weights, by).sum(1)[..., None]
        mx.eval(gram, ones)
    mass = nonnegative_least_squares(gram, ones)
    gram = mx.zeros_like(gram)
    for part, by in _parts(samples, alive.size, counts):
        shares = attention_weights(part, padded, scale=scale) * (alive * mass)[:, None]
        shares = _counted(shares, by) / mx.maximum(shares.sum(-1, keepdims=True), 1e-20)
        by_node = shares.swapaxes(1, 2)
        gram = mx.addmm(gram, by_node, shares)
        right = mx.addmm(right, by_node, _counted(part.output.astype(mx.float32), by))
        mx.eval(gram, right)
    sizes = [k.shape[0] for k in keys]
    towards = mx.stack([mx.pad(v.astype(mx.float32), [(0, count - v.shape[0]), (0, 0)]) for v in values])
    fitted, bias = ridge(gram, right, towards=towards, counts=sizes), mx.log(mass)
    mx.eval(fitted, bias)
    return [{"keys": padded[i, :m], "values": fitted[i, :m], "bias": bias[i, :m]} for i, m in enumerate(sizes)]


def nonnegative_least_squares(gram: mx.array, ones: mx.array) -> mx.array:
    """argmin over w >= 0 of |weights · w - 1|², by accelerated projected gradient, from weights' Gram [M, m, m] and
    column sums [M, m, 1] -> [M, m], kept above 1e-4.
    """
    step = 1 / _largest_eigenvalue(gram)
    w = y = mx.ones_like(ones)
    t = 1.0
    for i in range(_NNLS_STEPS):
        following = mx.maximum(y - step * (gram @ y - ones), 0)
        t_following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y, w, t = following + (t - 1) / t_following * (following - w), following, t_following
        if i % 50 == 0:
            mx.eval(w, y)
    return mx.maximum(w[..., 0], 1e-4)


def _largest_eigenvalue(gram: mx.array) -> mx.array:
    """An upper estimate by power iteration, [M, m, m] -> [M, 1, 1]; no entry is negative, so the start is near."""
    v = mx.ones((*gram.shape[:2], 1))
    for _ in range(20):
        v = gram @ v
        v = v / mx.linalg.norm(v, axis=1, keepdims=True)
    return 1.05 * mx.linalg.norm(gram @ v, axis=1, keepdims=True)


def ridge(gram: mx.array, right: mx.array, *, towards: mx.array, counts: Sequence[int]) -> mx.array:
    """The V [M, m, D] that minimise |shares · V - outputs|² + ridge · |V - towards|², from shares' Gram [M, m, m] and
    right side [M, m, D]; counts: of the m, what are nodes.

    Preconditioned conjugate gradients, which stay on the device; a direct solution would be computed on the CPU. What
    they have not found yet lies in directions that the samples hardly know, and is left as in `towards`.
    """
    M, m, _ = gram.shape
    diagonal = gram.reshape(M, m * m)[:, :: m + 1]
    factor = (_RIDGE * diagonal.sum(1) / mx.array(list(counts)))[:, None, None] + 1e-30
    inverse = 1 / (diagonal[..., None] + factor)
    values, rest = towards, right - gram @ towards
    direction = preconditioned = inverse * rest
    size = (rest * preconditioned).sum(1, keepdims=True)
    for i in range(_RIDGE_STEPS):
        image = gram @ direction + factor * direction
        step = size / mx.maximum((direction * image).sum(1, keepdims=True), 1e-30)
        values, rest = values + step * direction, rest - step * image
        preconditioned = inverse * rest
        following = (rest * preconditioned).sum(1, keepdims=True)
        direction, size = preconditioned + following / mx.maximum(size, 1e-30) * direction, following
        if i % 8 == 7:
            mx.eval(values, rest, direction, size)
    return values
