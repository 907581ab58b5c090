"""Learning a completion's feature map: from clusters of the keys, by regression on what attention saw."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...core.attention import Partial
from ...core.exp import exp
from ...core.quantize import dequantize, quantize
from ...heads import Completion, HeadArrays
from ...heads.completion import key_features, query_features
from ...retrieval.sketch import Sketch

_ITERATIONS = 10
_SHARPEST = 0.02  # variance within clusters over that of all keys: half-precision biases tell no less apart


class Distilled(Completion):
    """As it is trained: the complement, of queries [M, N, D + 1] whose last number is the threshold.

    keys, values: [M, n, D] of the middle, or `repeat` times fewer, and what selects among them, kept with the
    parameters. Every key below the threshold gets its weight from the feature map, one by one, which is what the
    summary less the keys above it comes to.
    """

    keys: mx.array
    values: mx.array
    selector: Sketch
    repeat: float

    @classmethod
    def start(
        cls,
        maps: Sequence[HeadArrays],
        keys: mx.array,
        values: mx.array,
        selector: Sketch,
        *,
        scale: float,
        repeat: float,
    ) -> "Distilled":
        """Heads with their maps; what the summary would hold is made when they are trained."""
        unused = ({"means": mx.zeros_like(m["w_key"]), "log_count": mx.zeros_like(m["b_key"])} for m in maps)
        bank = cls.stack([m | zeros for m, zeros in zip(maps, unused, strict=True)], scale=scale)
        bank.keys, bank.values, bank.selector, bank.repeat = keys, values, selector, repeat
        return bank

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        queries, threshold = queries[..., :-1], queries[..., -1:]
        below = self.selector.scores(queries) < threshold
        logs = query_features(parameters, queries)
        top = mx.stop_gradient(logs.max(-1, keepdims=True))
        weights = exp(logs - top) @ key_features(parameters, self.keys).swapaxes(1, 2)
        weights = mx.where(below, self.repeat * weights, 0.0)
        total = mx.maximum(weights.sum(-1, keepdims=True), 1e-30)
        return Partial((weights @ self.values) / total, (top + mx.log(total))[..., 0])


def clusters(keys: np.ndarray, queries: np.ndarray, count: int, *, scale: float, seed: int) -> HeadArrays:
    """One head's map to start from: a feature for each of `count` clusters of keys [n, D], close as queries [N, D] see
    it."""
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    metric = queries.T @ queries / len(queries)
    metric += 1e-3 * np.trace(metric) / len(metric) * np.eye(len(metric))
    root = np.linalg.cholesky(metric)
    centres, variance = _kmeans(keys @ root, count, seed=seed)
    plain = np.linalg.solve(root.T, centres.T).T
    arrays = {
        "w_query": scale * plain,
        "b_query": np.zeros(count),
        "w_key": centres @ root.T / variance,
        "b_key": -np.square(centres).sum(1) / (2 * variance),
    }
    return {name: mx.array(x.astype(np.float32)) for name, x in arrays.items()}


def _kmeans(points: np.ndarray, count: int, *, seed: int) -> tuple[np.ndarray, float]:
    """k-means++ and Lloyd's: centres [count, D], and the points' variance around them, per dimension."""
    random = np.random.default_rng(seed)
    centres = points[random.integers(len(points), size=1)]
    distance = np.full(len(points), np.inf)
    while len(centres) < count:
        distance = np.minimum(distance, np.square(points - centres[-1]).sum(1))
        chosen = random.choice(len(points), p=(distance + 1e-12) / (distance + 1e-12).sum())
        centres = np.concatenate([centres, points[chosen : chosen + 1]])
    for _ in range(_ITERATIONS):
        nearest = (np.square(centres).sum(1) / 2 - points @ centres.T).argmin(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, points)
        members = np.bincount(nearest, minlength=count)[:, None]
        centres = np.where(members > 0, sums / np.maximum(members, 1), centres)
    within, whole = np.square(points - centres[nearest]).mean(), points.var(0).mean()
    return centres, float(max(within, _SHARPEST * whole)) + 1e-6


def summarise(head: HeadArrays, keys: mx.array, values: mx.array, *, bits: int) -> HeadArrays:
    """Adds S / u and log u of keys and values [n, D] to a head's learned map.

    The map is rounded first to what the file will hold: shares that are subtracted later are those summed here.
    """
    stored = head | {n: _as_stored(head[n], bits) for n in ("w_query", "b_query", "w_key", "b_key")}
    shares = key_features({n: stored[n][None] for n in ("w_key", "b_key")}, keys[None])[0]
    count = mx.maximum(shares.sum(0), 1e-6)
    means = shares.swapaxes(0, 1) @ values.astype(mx.float32) / count[:, None]
    stored |= {"means": means, "log_count": mx.log(count)}
    mx.eval(stored)
    return stored


def _as_stored(x: mx.array, bits: int) -> mx.array:
    if x.ndim == 1:
        return x.astype(mx.float16).astype(mx.float32)
    return x if bits == 16 else dequantize(quantize(x, bits=bits), bits=bits)
