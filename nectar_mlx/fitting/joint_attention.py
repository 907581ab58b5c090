"""Attention over nodes and live tokens as one set, for training nodes through a model.

A `NectarCache` merges the two parts, each with its own log-normalizer. Here each sequence's live keys stand behind the
nodes, a node's bias is one more number of its key, and one softmax is over all of them: fewer operations, and a reverse
pass that is written out:

    p = softmax(q kᵀ),  o = p v;    ∂s = p (∂o vᵀ - ∂o·o),  ∂q = ∂s k,  ∂k = ∂sᵀ q,  ∂v = pᵀ ∂o

Shapes: as in core/attention.py; m nodes, S = m + T keys of each sequence, G = H / K query heads that share a KV head.
"""

import mlx.core as mx

from ..core.attention import EMPTY, in_float32
from ..core.gradients import Arrays, with_vjp
from ..mlxlm.cache import NectarCache

_TAIL = 8  # numbers behind a key, the first of which is its bias: rows of such products are aligned


class JointCache(NectarCache):
    """The cache of one layer whose bank has nodes, for sequences that are read in one call: it keeps nothing."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """As a `NectarCache`."""
        if mask != "causal" or sinks is not None or values.shape[-1] != queries.shape[-1]:
            return super().attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        if (offset := self.live_offset) is not None:
            keys = keys.astype(mx.float32) - offset[:, None]
        p = self.bank.parameters
        return over_both(queries, keys, values, p["keys"], p["values"], p["bias"], scale=scale).astype(queries.dtype)


def over_both(
    queries: mx.array,
    live_keys: mx.array,
    live_values: mx.array,
    keys: mx.array,
    values: mx.array,
    bias: mx.array,
    *,
    scale: float,
) -> mx.array:
    """Attention of queries [B, H, T, D] over nodes, keys and values [K, m, D] and biases [K, m], and, causally, over
    the queries' own live keys and values [B, K, T, D] -> [B, H, T, D] float32. Differentiable in all arrays."""
    B, H, T, D = queries.shape
    K = len(bias)
    live_keys, live_values, queries = in_float32(live_keys, live_values, queries)
    tail = mx.pad(bias.astype(mx.float32)[..., None], [(0, 0), (0, 0), (0, _TAIL - 1)])
    nodes = mx.concatenate([keys.astype(mx.float32), tail], axis=-1)
    of_each = [mx.broadcast_to(x, (B, *x.shape)) for x in (nodes, values.astype(mx.float32))]
    ones = mx.broadcast_to((mx.arange(_TAIL) < 1).astype(mx.float32), (B, H, T, _TAIL))
    output, _ = _attend(
        mx.concatenate([scale * queries, ones], axis=-1).reshape(B, K, -1, T, D + _TAIL),
        mx.concatenate([of_each[0], mx.pad(live_keys, [(0, 0)] * 3 + [(0, _TAIL)])], axis=2),
        mx.concatenate([of_each[1], live_values], axis=2),
    )
    return output.reshape(B, H, T, -1)


def _attend_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    queries, keys, values = primals
    output, p = outputs
    flat, d_output = (x.reshape(*output.shape[:2], -1, x.shape[-1]) for x in (queries, cotangents[0]))
    constant = (d_output * output).sum(-1, keepdims=True)
    d_scores = p * (d_output @ values.swapaxes(-1, -2) - constant)
    d_queries = (d_scores @ keys).reshape(queries.shape)
    return d_queries, d_scores.swapaxes(-1, -2) @ flat, p.swapaxes(-1, -2) @ d_output


@with_vjp(_attend_vjp)
def _attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """Queries [B, K, G, T, D] over keys and values [B, K, S, D], the last T of which are their own, all float32: the
    output [B, K, G · T, D], and for the reverse pass the probabilities [B, K, G · T, S]."""
    B, K, G, T, D = queries.shape
    S = keys.shape[2]
    visible = mx.arange(S) <= mx.arange(S - T, S)[:, None]
    scores = queries.reshape(B, K, G * T, D) @ keys.swapaxes(-1, -2)
    scores = mx.where(visible, scores.reshape(B, K, G, T, S), EMPTY).reshape(B, K, G * T, S)
    p = mx.softmax(scores, axis=-1)
    return p @ values, p
