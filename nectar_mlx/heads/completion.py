"""Top-k retrieval with fixed-size linear-attention completion (arXiv 2604.05438).

A learned positive feature map stands for the exponential kernel, exp(scale · q·k) ≈ φ(q)·ψ(k), with

    φ(q) = exp(W_q q + b_q),    ψ(k) = softmax(W_k k + b_k),    S = Σ ψ(k) vᵀ,    u = Σ ψ(k)  over the middle,

so that each feature is a cluster of keys, ψ_f(k) the share of k in it, and the retrieved keys' shares are subtracted:

    o = φ(q)ᵀ (S - Σ_R ψ(k) vᵀ) / φ(q)ᵀ (u - Σ_R ψ(k)).

The paper leaves the form of the map open; this one keeps u - Σ_R ψ non-negative but for rounding, which is cut off.
"""

from typing import ClassVar

import mlx.core as mx

from ..core.attention import EMPTY, Partial, join
from ..core.device import device
from ..core.exp import exp
from .base import HeadArrays, Size
from .hybrid import HybridHead, Retrieved, shared


class Completion(HybridHead):
    """w_query, w_key, means = S / u [F, D], b_query, b_key, log_count = log u [F] a head, and anchors; size = (F,)."""

    kind = "completion"
    decodes_stored = False  # nodes are computed from them
    padding: ClassVar = {"b_query": EMPTY, "b_key": EMPTY}

    def nodes(self, parameters: HeadArrays) -> HeadArrays:
        p = parameters
        return {"keys": p["w_query"] / self.scale, "values": p["means"], "bias": p["b_query"] + p["log_count"]}

    def complement(self, parameters: HeadArrays, queries: mx.array, retrieved: Retrieved) -> Partial:
        M, F = parameters["b_key"].shape
        k, D = retrieved.keys.shape[2:]
        step = max(1, device().max_batch_scores // (M * F * max(k, D)))
        parts = []
        for start in range(0, queries.shape[1], step):
            part = Retrieved(*(x[:, start : start + step] for x in retrieved))
            parts.append(self._without(parameters, queries[:, start : start + step], part))
            mx.eval(parts[-1])
        return join(parts, axis=1)

    def _without(self, p: HeadArrays, queries: mx.array, retrieved: Retrieved) -> Partial:
        """queries [M, N, G, D]; every retrieved key's share of each feature is taken out of the summary."""
        M, N, k, D = retrieved.keys.shape
        G = queries.shape[2]
        shares = key_features(p, retrieved.keys.reshape(M, N * k, D)).reshape(M, N, k, -1)
        count = mx.exp(p["log_count"])[:, None]
        left = count - shares.sum(2)
        alive = left > 1e-3 * count
        sums = (count[..., None] * p["means"][:, None]) - shares.swapaxes(2, 3) @ retrieved.values.astype(mx.float32)
        remaining = mx.where(alive, mx.log(mx.maximum(left, 1e-9)), EMPTY)
        logs = query_features(p, queries.reshape(M, N * G, D)).reshape(M, N, G, -1) + remaining[:, :, None]
        return shared(logs, sums / mx.maximum(left, 1e-9)[..., None] * alive[..., None])

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        (features,) = size
        matrices = {n: (features, head_dim) for n in ("w_query", "w_key", "means")}
        vectors = {n: (features,) for n in ("b_query", "b_key", "log_count")}
        return matrices | vectors | super().shapes(size, head_dim)

    @classmethod
    def size_of(cls, head: HeadArrays) -> Size:
        return (head["b_query"].shape[0],)


def query_features(p: HeadArrays, queries: mx.array) -> mx.array:
    """log φ of queries [M, N, D] -> [M, N, F]."""
    return queries.astype(mx.float32) @ p["w_query"].swapaxes(1, 2) + p["b_query"][:, None]


def key_features(p: HeadArrays, keys: mx.array) -> mx.array:
    """ψ of keys [M, n, D] -> [M, n, F]; a key's shares add up to one."""
    logits = keys.astype(mx.float32) @ p["w_key"].swapaxes(1, 2) + p["b_key"][:, None]
    shares = exp(logits - mx.stop_gradient(logits.max(-1, keepdims=True)))
    return shares / shares.sum(-1, keepdims=True)
