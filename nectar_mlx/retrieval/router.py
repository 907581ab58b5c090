"""The router: finds the keys to read without scoring them all.

Keys whose sketches lie close together, as queries see them, form clusters. A token's queries score the clusters'
centres, then the sketches of the best clusters. A few heads copy: they look for single keys, which no centre tells;
there all sketches are scored. Captured queries tell which heads those are, and how much the others need.
"""

import math

import mlx.core as mx
import numpy as np

from ..heads.residual import NOTHING
from . import sketch
from .keys import Arrays
from .selection import Choice, Selector, best, largest, log_sum
from .sketch import CLUSTER, PER_KEY, decode, encode

_MOST = 0.2  # of the clusters: heads that need more are searched whole


class Router:
    """One layer's."""

    def __init__(self, small: Arrays, layer: int, *, scale: float):
        """small: what `sketch.build` made."""
        searched = small["sketch.scanned"][layer] > _MOST
        whole, parts = np.flatnonzero(searched), np.flatnonzero(~searched)
        self._selectors: list[tuple[mx.array, Selector]] = []
        if len(whole):
            heads = [(layer, int(head)) for head in whole]
            self._selectors.append((mx.array(whole), sketch.load(small, heads, scale=scale)))
        if len(parts):
            self._selectors.append((mx.array(parts), _Clusters(small, layer, parts, scale=scale)))
        self._order = mx.array(np.argsort(np.concatenate([whole, parts])))
        mx.eval(self._order, [heads for heads, _ in self._selectors])

    @property
    def nbytes(self) -> int:
        return sum(selector.nbytes for _, selector in self._selectors)

    def step_bytes(self, count: int) -> int:
        return sum(selector.step_bytes(count) for _, selector in self._selectors)

    def choose(self, queries: mx.array, anchors: mx.array, *, count: int) -> Choice:
        found = [selector.choose(queries[at], anchors[at], count=count) for at, selector in self._selectors]
        if len(found) == 1:
            return found[0]
        return Choice(*(mx.concatenate(list(xs))[self._order] for xs in zip(*found, strict=True)))


class _Clusters:
    """K heads of n keys each."""

    def __init__(self, small: Arrays, layer: int, heads: np.ndarray, *, scale: float):
        codes, scales, projection, mean, order, scanned = (
            small[f"sketch.{name}"][layer, heads]
            for name in ("codes", "scales", "projection", "mean", "order", "scanned")
        )
        K, n, rank = codes.shape
        spare = [(0, 0), (0, -n % CLUSTER)]  # places in the last cluster; a scale of zero tells them
        at = np.pad(order, spare)
        codes = np.take_along_axis(codes, at[..., None], axis=1)
        scales = np.pad(np.take_along_axis(scales, order, axis=1), spare)
        members = (scales > 0).reshape(K, -1, CLUSTER).sum(-1)
        centres = decode(codes, scales).reshape(K, -1, CLUSTER, rank).sum(2) / members[..., None]
        self._least = float(scanned.max())
        self._n, self._clusters, self._scale = int(n), int(members.shape[1]), scale
        self._codes, self._scales = mx.array(codes.reshape(-1, CLUSTER, rank)), mx.array(scales.reshape(-1, CLUSTER))
        self._positions, self._log_members = mx.array(at), mx.array(np.log(members).astype(np.float32))
        self._centres, self._centre_scales = (mx.array(x) for x in encode(centres))
        self._projection, self._mean = (mx.array(x.astype(np.float32)) for x in (projection, mean))
        mx.eval([x for x in vars(self).values() if isinstance(x, mx.array)])  # MLX's streams are a thread's own

    @property
    def nbytes(self) -> int:
        own = self._codes, self._scales, self._positions, self._centres, self._centre_scales, self._log_members
        return sum(x.nbytes for x in own) + 2 * (self._projection.size + self._mean.size)

    def step_bytes(self, count: int) -> int:
        K, rank = self._positions.shape[0], self._codes.shape[-1]
        centres = self._centres.nbytes + self._centre_scales.nbytes + self._log_members.nbytes
        scanned = K * self._scanned(count) * CLUSTER * (rank + 2)
        return centres + scanned + K * count * 4 + 2 * (self._projection.size + self._mean.size)

    def _scanned(self, count: int) -> int:
        """How many clusters' keys are scored."""
        return min(self._clusters, math.ceil(self._least * self._clusters + PER_KEY * count / CLUSTER))

    def choose(self, queries: mx.array, anchors: mx.array, *, count: int) -> Choice:
        K, N, G, D = queries.shape
        count, scanned, rank = min(count, self._n), self._scanned(count), self._codes.shape[-1]
        queries = queries.astype(mx.float32).reshape(K, N * G, D) * self._scale
        projected, common = queries @ self._projection, (queries @ self._mean[..., None]).reshape(K, N, G, 1)
        found = projected @ self._centres.astype(mx.float32).swapaxes(1, 2) * self._centre_scales[:, None]
        centres = found.reshape(K, N, G, -1) + common
        masses = centres + self._log_members[:, None, None]
        total = mx.logaddexp(log_sum(masses), anchors)
        near = largest((centres - total[..., None]).max(2), scanned - 1)[..., :scanned]
        rows = near + mx.arange(K)[:, None, None] * self._clusters
        sketches = self._codes[rows].astype(mx.float32).reshape(K, N, scanned * CLUSTER, rank)
        scales = self._scales[rows].astype(mx.float32).reshape(K, N, 1, -1)
        found = projected.reshape(K, N, G, rank) @ sketches.swapaxes(2, 3) * scales + common
        found = mx.where(scales > 0, found, NOTHING)
        # A centre says little of a cluster that holds one large score: what was scored counts as it is.
        others = mx.put_along_axis(mx.zeros((*near.shape[:2], self._clusters)), near, mx.array(NOTHING), axis=-1)
        total = mx.logaddexp(mx.logaddexp(log_sum(masses + others[:, :, None]), log_sum(found)), anchors)
        choice = best(found, total, count=count)
        cluster = mx.take_along_axis(near, choice.positions // CLUSTER, axis=-1)
        places = (cluster * CLUSTER + choice.positions % CLUSTER).reshape(K, -1)
        positions = mx.take_along_axis(self._positions, places, axis=1).reshape(K, N, -1)
        return Choice(positions, choice.scores, choice.threshold)
