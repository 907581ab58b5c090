"""Sketches of keys: a few int8 numbers each, from which a key's score is nearly known without reading it.

Scores are products of queries and keys, so the directions that matter are those in which real queries are large and
keys differ. With C the queries' second moment, keys are whitened by C^½, their `rank` principal directions are kept,
and stored as int8 with a scale a key: at 32 of 64 dimensions 34 bytes instead of 256. (Product quantisation of as many
bytes finds as much and takes a gather for every number; log-sum-exps of consecutive keys find far less:
docs/log/router.md.)
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..heads.hybrid import anchor_positions, middle
from ..store.tensor_file import Arrays
from .selection import Scoring

CLUSTER = 16  # keys that lie close together, by their sketches
PER_KEY = 4  # sketches that are scored for each key that will be read
# `_scanned` is chosen for these fractions of keys read, so that the share of attention that is missed grows by at most
# _MAX_LOSS, on so many queries.
_FRACTIONS, _MAX_LOSS, _TRIAL_QUERIES = (0.01, 0.04), 0.03, 128
_ITERATIONS = 3  # of the power iteration that finds a principal direction


class Sketch(Scoring):
    """Some heads': codes int8 [M, n, rank], scales [M, n], projection [M, D, rank] and mean [M, D] of the keys."""

    def __init__(self, codes: mx.array, scales: mx.array, projection: mx.array, mean: mx.array, *, scale: float):
        self._codes, self._scales, self._scale = codes, scales, scale
        self._projection, self._mean = projection.astype(mx.float32), mean.astype(mx.float32)
        mx.eval(codes, scales, self._projection, self._mean)  # in this thread: MLX's streams are a thread's own

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes + 2 * (self._projection.size + self._mean.size)

    def scores(self, queries: mx.array) -> mx.array:
        queries = queries.astype(mx.float32) * self._scale
        scores = (queries @ self._projection) @ self._codes.astype(mx.float32).swapaxes(1, 2)
        return scores * self._scales.astype(mx.float32)[:, None] + queries @ self._mean[..., None]


def build(keys: Sequence[mx.array], queries: Sequence[np.ndarray], *, scale: float, rank: int | None = None) -> Arrays:
    """The arrays of all layers' sketches, as the file of keys holds them.

    keys: [K, n, D] a layer, the whole context's. queries: captured ones [K, N, D] a layer. rank: default D / 2.
    """
    D = keys[0].shape[-1]
    heads = [
        _head(np.array(layer[head].astype(mx.float32)), captured[head], rank or max(1, D // 2), scale)
        for layer, captured in zip(keys, queries, strict=True)
        for head in range(layer.shape[0])
    ]
    shape = (len(keys), keys[0].shape[0])
    stacked = {name: np.stack([head[name] for head in heads]) for name in heads[0]}
    return {f"sketch.{name}": x.reshape(*shape, *x.shape[1:]) for name, x in stacked.items()}


def load(
    small: Arrays, heads: Sequence[tuple[int, int]], *, scale: float, keys: np.ndarray | slice = slice(None)
) -> Sketch:
    """The sketches of some heads, (layer, KV head) each. keys: those of the middle that are to be scored."""
    layers, kv_heads = [layer for layer, _ in heads], [head for _, head in heads]
    arrays = {name: small[f"sketch.{name}"][layers, kv_heads] for name in ("codes", "scales", "projection", "mean")}
    arrays |= {name: arrays[name][:, keys] for name in ("codes", "scales")}
    return Sketch(**{name: mx.array(x) for name, x in arrays.items()}, scale=scale)


def encode(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [..., rank] as int8 and their scales [...], float16, never zero."""
    scales = np.maximum(np.abs(numbers).max(-1), 1e-3) / 127
    return np.round(numbers / scales[..., None]).astype(np.int8), scales.astype(np.float16)


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return codes.astype(np.float32) * scales.astype(np.float32)[..., None]


def _head(keys: np.ndarray, queries: np.ndarray, rank: int, scale: float) -> Arrays:
    """keys [n, D] of the whole context, queries [N, D]."""
    inside = keys[middle(len(keys))].astype(np.float64)
    mean = inside.mean(0)
    wide = queries.astype(np.float64)
    size, directions = np.linalg.eigh(wide.T @ wide / len(wide))
    spread = np.sqrt(np.maximum(size, 1e-3 * size.max()))  # other queries may have what none of these has
    whitened = (inside - mean) @ (directions * spread)
    _, axes = np.linalg.eigh(whitened.T @ whitened)
    kept = axes[:, ::-1][:, :rank]
    codes, scales = encode(whitened @ kept)
    projection = (directions / spread) @ kept
    points = decode(codes, scales)
    order = np.concatenate(_halved(points, np.arange(len(points))))
    trial = scale * queries[:: max(1, len(queries) // _TRIAL_QUERIES)].astype(np.float32)
    anchors = trial @ keys[anchor_positions(len(keys))].T - (trial @ mean.astype(np.float32))[:, None]
    return {
        "codes": codes,
        "scales": scales,
        "projection": projection.astype(np.float16),
        "mean": mean.astype(np.float16),
        "order": order.astype(np.int32),
        "scanned": np.float32(_scanned(points[order], trial @ projection.astype(np.float32), anchors)),
    }


def _scanned(points: np.ndarray, queries: np.ndarray, anchors: np.ndarray) -> float:
    """The share of the clusters to scan besides PER_KEY sketches for each key that is read, so that little is missed
    that scores of all sketches would find.

    points [n, rank], cluster by cluster; queries [N, rank]; anchors [N, A]: the anchors' scores.
    """
    n, count = len(points), -(-len(points) // CLUSTER)
    starts = np.arange(0, n, CLUSTER)
    centres = np.add.reduceat(points, starts) / np.diff([*starts, n])[:, None]
    nearest = np.argsort(-queries @ centres.T, axis=1)
    scores = queries @ points.T
    top = np.maximum(scores.max(1), anchors.max(1))[:, None]
    weights = np.exp(scores - top)
    shares = weights / (weights.sum(1) + np.exp(anchors - top).sum(1))[:, None]
    needed = 0.0
    for fraction in _FRACTIONS:
        read = max(1, int(fraction * n))
        chosen = np.where(shares >= -np.partition(-shares, read - 1, axis=1)[:, read - 1 : read], shares, 0)
        covered = np.take_along_axis(np.add.reduceat(chosen, starts, axis=1), nearest, axis=1).mean(0).cumsum()
        missed = shares.sum(1).mean() - covered
        clusters = 1 + int((missed <= (1 + _MAX_LOSS) * missed[-1] + 1e-4).argmax())
        needed = max(needed, clusters / count - PER_KEY * read / n)
    return needed


def _halved(points: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """The rows of points [n, rank] in clusters of CLUSTER, the last one of what is left: halved again and again, about
    along the direction in which they differ most."""
    count = -(-len(rows) // CLUSTER)
    if count < 2:
        return [rows]
    inside = points[rows] - points[rows].mean(0)
    along = inside[:, inside.var(0).argmax()]
    for _ in range(_ITERATIONS):
        along = inside @ (along @ inside) / (np.linalg.norm(along) + 1e-30)
    half = count // 2 * CLUSTER
    order = np.argpartition(along, half - 1)
    return _halved(points, rows[order[:half]]) + _halved(points, rows[order[half:]])
