"""The router: finds the keys to read without scoring them all.

Keys whose sketches lie close together, as queries see them, form clusters. A token's queries score the clusters'
centres, then the sketches of the best clusters: at 1% of 6,000 tokens a fifth of the keys, 9 bytes a key instead of 34
(docs/log.md).
"""

import math

import mlx.core as mx
import numpy as np

from ..heads.residual import NOTHING
from .keys import Arrays
from .selection import Choice, best, largest, log_sum
from .sketch import CLUSTER, decode, encode

_SCANNED = 1 / 8  # of the keys have their sketches scored whatever the count, and
_PER_KEY = 8  # for each one that will be read


class Router:
    """One layer's: K heads of n keys in C clusters."""

    def __init__(self, small: Arrays, layer: int, *, scale: float):
        """small: what `sketch.build` made."""
        codes, scales, projection, mean, order = (
            small[f"sketch.{name}"][layer] for name in ("codes", "scales", "projection", "mean", "order")
        )
        K, n, rank = codes.shape
        spare = [(0, 0), (0, -n % CLUSTER)]  # places in the last cluster; a scale of zero tells them
        at = np.pad(order, spare)
        codes = np.take_along_axis(codes, at[..., None], axis=1)
        scales = np.pad(np.take_along_axis(scales, order, axis=1), spare)
        members = (scales > 0).reshape(K, -1, CLUSTER).sum(-1)
        centres = decode(codes, scales).reshape(K, -1, CLUSTER, rank).sum(2) / members[..., None]
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
        return min(self._clusters, math.ceil((_SCANNED * self._n + _PER_KEY * count) / CLUSTER))

    def choose(self, queries: mx.array, anchors: mx.array, *, count: int) -> Choice:
        K, N, G, D = queries.shape
        count, scanned, rank = min(count, self._n), self._scanned(count), self._codes.shape[-1]
        queries = queries.astype(mx.float32).reshape(K, N * G, D) * self._scale
        projected, common = queries @ self._projection, (queries @ self._mean[..., None]).reshape(K, N, G, 1)
        found = projected @ self._centres.astype(mx.float32).swapaxes(1, 2) * self._centre_scales[:, None]
        centres = found.reshape(K, N, G, -1) + common
        total = mx.logaddexp(log_sum(centres + self._log_members[:, None, None]), anchors)
        near = largest((centres - total[..., None]).max(2), scanned - 1)[..., :scanned]
        rows = near + mx.arange(K)[:, None, None] * self._clusters
        sketches = self._codes[rows].astype(mx.float32).reshape(K, N, scanned * CLUSTER, rank)
        scales = self._scales[rows].astype(mx.float32).reshape(K, N, 1, -1)
        found = projected.reshape(K, N, G, rank) @ sketches.swapaxes(2, 3) * scales + common
        choice = best(mx.where(scales > 0, found, NOTHING), total, count=count)
        cluster = mx.take_along_axis(near, choice.positions // CLUSTER, axis=-1)
        places = (cluster * CLUSTER + choice.positions % CLUSTER).reshape(K, -1)
        positions = mx.take_along_axis(self._positions, places, axis=1).reshape(K, N, -1)
        return Choice(positions, choice.scores, choice.threshold)
