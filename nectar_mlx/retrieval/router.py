"""The router: finds the keys to read without scoring them all.

Keys whose sketches lie close together, as queries see them, form clusters. A token's queries score the clusters'
centres, then the sketches of the best clusters. A few heads copy: they look for single keys, which the centres do not
show; for those all sketches are scored. Captured queries decide which heads those are, and how much the others need.
"""

import math

import mlx.core as mx
import numpy as np

from ..core.attention import EMPTY
from ..store.kv_file import KeyFile
from ..store.tensor_file import Arrays
from . import sketch
from .selection import Choice, Selector, best, log_sum, top
from .sketch import CLUSTER, PER_KEY, decode, encode

_MAX_SCANNED = 0.2  # of the clusters: heads that need more are searched whole
_DENSE_TOKENS = 4  # at once, from which on scoring all sketches takes less time than collecting some


class Router:
    """The selector of one layer."""

    def __init__(self, small: Arrays, layer: int, *, scale: float):
        """small: what `sketch.build` made."""
        searched = small["sketch.scanned"][layer] > _MAX_SCANNED
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
        choices = [selector.choose(queries[at], anchors[at], count=count) for at, selector in self._selectors]
        if len(choices) == 1:
            return choices[0]
        return Choice(*(mx.concatenate(list(xs))[self._order] for xs in zip(*choices, strict=True)))


def routers(keys: KeyFile, *, scale: float) -> list[Router]:
    """One a layer."""
    return [Router(keys.small, layer, scale=scale) for layer in range(len(keys.rows))]


class _Clusters:
    """K heads of n keys each."""

    def __init__(self, small: Arrays, layer: int, heads: np.ndarray, *, scale: float):
        names = ("codes", "scales", "projection", "mean", "order", "scanned")
        codes, scales, projection, mean, order, scanned = [small[f"sketch.{name}"][layer, heads] for name in names]
        K, n, rank = codes.shape
        spare = [(0, 0), (0, -n % CLUSTER)]  # places in the last cluster; their scale is zero
        at = np.pad(order, spare)
        codes = np.take_along_axis(codes, at[..., None], axis=1)
        scales = np.pad(np.take_along_axis(scales, order, axis=1), spare)
        members = (scales > 0).reshape(K, -1, CLUSTER).sum(-1)
        centres = decode(codes, scales).reshape(K, -1, CLUSTER, rank).sum(2) / members[..., None]
        self._least = float(scanned.max())
        self._n, self._clusters, self._scale = int(n), int(members.shape[1]), scale
        self._codes, self._scales = mx.array(codes.reshape(-1, CLUSTER, rank)), mx.array(scales.reshape(-1, CLUSTER))
        self._positions, self._log_members = mx.array(at), mx.array(np.log(members).astype(np.float32))
        self._centres, self._centre_scales = [mx.array(x) for x in encode(centres)]
        self._projection, self._mean = [mx.array(x.astype(np.float32)) for x in (projection, mean)]
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
        count = min(count, self._n)
        queries = queries.astype(mx.float32).reshape(K, N * G, D) * self._scale
        projected, common = queries @ self._projection, (queries @ self._mean[..., None]).reshape(K, N, G)
        centres = projected @ self._centres.astype(mx.float32).swapaxes(1, 2) * self._centre_scales[:, None]
        centres = centres.reshape(K, N, G, -1)
        # Of the keys' scores less what they have in common; so are the totals.
        total = mx.logaddexp(log_sum(centres + self._log_members[:, None, None]), anchors - common)
        if N >= _DENSE_TOKENS:
            near, shares = None, self._all(projected, total)
        else:
            near = top((centres - total[..., None]).max(2), self._scanned(count))
            shares = self._near(projected.reshape(K, N, G, -1), total, near)
        choice = best(shares, count=count)
        return choice._replace(positions=self._at(choice.positions, near)).scaled(total + common)

    def _all(self, projected: mx.array, total: mx.array) -> mx.array:
        """The log of all keys' shares, [K, N, G, C · CLUSTER], in one product: projected [K, N · G, rank]."""
        K, N, G = total.shape
        scales = self._scales.astype(mx.float32)[..., None]
        codes = (self._codes.astype(mx.float32) * scales).reshape(K, -1, projected.shape[-1])
        empty = mx.where(scales > 0, 0, EMPTY).reshape(K, -1, 1)
        keys = mx.concatenate([codes, mx.ones(empty.shape), empty], axis=-1)
        flat = -total.reshape(K, N * G, 1)
        extended = mx.concatenate([projected, flat, mx.ones(flat.shape)], axis=-1)
        return (extended @ keys.swapaxes(1, 2)).reshape(K, N, G, -1)

    def _near(self, projected: mx.array, total: mx.array, near: mx.array) -> mx.array:
        """The same of some clusters' keys, near [K, N, m] -> [K, N, G, m · CLUSTER]; projected [K, N, G, rank]."""
        K, N, m = near.shape
        rows = near + mx.arange(K)[:, None, None] * self._clusters
        codes = self._codes[rows].astype(mx.float32).reshape(K, N, m * CLUSTER, -1)
        scales = self._scales[rows].astype(mx.float32).reshape(K, N, 1, -1)
        scores = projected @ codes.swapaxes(2, 3) * scales
        return mx.where(scales > 0, scores, EMPTY) - total[..., None]

    def _at(self, places: mx.array, near: mx.array | None) -> mx.array:
        """Positions in the middle of places [K, N, k] among the keys that were scored."""
        if near is not None:
            places = mx.take_along_axis(near, places // CLUSTER, axis=-1) * CLUSTER + places % CLUSTER
        K = places.shape[0]
        return mx.take_along_axis(self._positions, places.reshape(K, -1), axis=1).reshape(places.shape)
