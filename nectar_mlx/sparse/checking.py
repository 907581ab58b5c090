"""A small problem on which the kernels of sparse attention are compared with plain operations before their first use.

As in kernels/checking.py, near and far keys have about the same mass, and the key just after a query would have a large
score: whatever a kernel leaves out or should not see shows in the result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.attention import EMPTY, Partial, in_float32
from ..kernels.checking import difference, relative_error
from .patterns import Pattern

BATCH, HEADS, KV_HEADS, QUERIES = 2, 4, 2, 70
TOLERANCE = {mx.float16: 4e-3, mx.bfloat16: 2e-2}  # largest error / largest number, of each result
_MIN_POSITIONS, _MAX_POSITIONS = 150, 1 << 14  # the far keys of strides larger than any text needs are left out
_SPREAD = 1.0  # standard deviation of scores

Attend = Callable[[mx.array, mx.array, mx.array], Partial]


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe:
    """inputs: queries [BATCH, HEADS, QUERIES, D], the last of S positions, and keys and values [BATCH, KV_HEADS, S, D].
    weights: of the output and the log-normaliser in the sum whose gradients are compared."""

    pattern: Pattern
    scale: float
    inputs: list[mx.array]
    weights: list[mx.array]

    def reference(self, queries: mx.array, keys: mx.array, values: mx.array) -> Partial:
        """Attention under the pattern's mask, by plain operations in float32."""
        return dense(queries, keys, values, pattern=self.pattern, scale=self.scale)

    def results(self, attend: Attend, *, backwards: bool) -> list[mx.array]:
        """(o, L), or the gradients of queries, keys and values."""
        if not backwards:
            return list(attend(*self.inputs))

        def loss(*inputs: mx.array) -> mx.array:
            output, log_normalizer = attend(*inputs)
            return mx.add((output * self.weights[0]).sum(), (log_normalizer * self.weights[1]).sum())

        return list(mx.grad(loss, argnums=(0, 1, 2))(*self.inputs))

    def errors(self, attend: Attend, *, backwards: bool) -> list[float]:
        """Of each result: largest difference from the reference's / its largest number."""
        results = self.results(attend, backwards=backwards)
        with mx.stream(mx.cpu):  # elsewhere float32 products may be rounded to TF32
            expected = self.results(self.reference, backwards=backwards)
            mx.eval(expected)
        return [relative_error(x, y) for x, y in zip(results, expected, strict=True)]

    def mismatch(self, attend: Attend, *, backwards: bool) -> str | None:
        """What is wrong with the results of the kernels; None where nothing is."""
        tolerance = TOLERANCE[self.inputs[0].dtype]
        errors = self.errors(attend, backwards=backwards)
        return next((difference(error, tolerance) for error in errors if not error <= tolerance), None)


def probe(pattern: Pattern, *, dtype: mx.Dtype, head_dim: int, scale: float) -> Probe:
    """Queries whose row is far enough down the grid of the pattern to see far keys."""
    rng = np.random.default_rng(0)
    S = min(max((pattern.gap + 2) * pattern.stride + pattern.stride // 2 + 3, _MIN_POSITIONS), _MAX_POSITIONS)
    unit = math.sqrt(_SPREAD / (scale * math.sqrt(head_dim)))  # of queries and keys, so that scores are what they are
    common = rng.standard_normal(head_dim)  # what all queries have in common, and far keys have too
    common *= math.sqrt(2 * math.sqrt(head_dim)) / np.linalg.norm(common)
    queries = rng.standard_normal((BATCH, HEADS, QUERIES, head_dim))
    keys, values = rng.standard_normal((2, BATCH, KV_HEADS, S, head_dim))
    group, first = HEADS // KV_HEADS, S - QUERIES  # the position of the first query
    raised = _SPREAD * queries[:, ::group, :-1] / math.sqrt(head_dim)
    keys[:, :, first + 1 :] += math.log(4 * pattern.stride) * raised
    far = slice(max(0, first - (pattern.gap + 1) * pattern.stride))
    keys[:, :, far] += math.log(pattern.stride / pattern.columns) / 2 * common
    weights = [rng.standard_normal(queries.shape), rng.standard_normal(queries.shape[:3])]
    arrays = [mx.array(x.astype(np.float32)) for x in (unit * (queries + common), unit * keys, values, *weights)]
    return Probe(pattern=pattern, scale=scale, inputs=[x.astype(dtype) for x in arrays[:3]], weights=arrays[3:])


def dense(queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Pattern, scale: float) -> Partial:
    """The definition: dense attention in float32 under the pattern's mask."""
    (B, H, T, D), (K, S) = queries.shape, keys.shape[1:3]
    queries, keys, values = in_float32(queries, keys, values)
    scores = scale * queries.reshape(B, K, H // K * T, D) @ keys.swapaxes(-1, -2)
    scores = mx.where(pattern.mask(T, S, heads=H), scores.reshape(B, H, T, S), EMPTY)
    log_normalizer = mx.logsumexp(scores, axis=-1)
    weights = mx.exp(scores - log_normalizer[..., None]).reshape(B, K, H // K * T, S)
    return Partial((weights @ values).reshape(B, H, T, D), log_normalizer)
