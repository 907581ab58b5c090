"""Decode steps on random layers, and what they should give: a float64 reference of every kind of head."""

import mlx.core as mx
import numpy as np

from nectar_mlx.core.quantize import dequantize, quantize
from nectar_mlx.heads import Corrected, Quadrature, TargetScore
from nectar_mlx.heads.work import WorkKind
from nectar_mlx.kernels import DecodeKernel
from nectar_mlx.kernels.packing import DTYPES, pack

BACKEND = "cuda" if mx.cuda.is_available() else "metal"
# What is stored in 16 bits is exact here; of deep networks the hidden layers round to it.
TOLERANCE = {"float32": 2e-5, "float16": 1.5e-3, "bfloat16": 1e-2}
BANKS = {"quadrature": Quadrature, "corrected": Corrected, "mlp": TargetScore, "deep": TargetScore}


def make_heads(kind, sizes, head_dim, storage, seed=0, unseen=slice(0)):
    """Heads of random parameters: (as `storage` keeps them, and the values that it keeps).

    unseen: columns of queries that are nothing to them.
    """
    rng = np.random.default_rng(seed)
    stored, exact = [], []
    bits = int(storage[3:]) if storage.startswith("int") else 16
    for size in sizes:
        kept, values = {}, {}
        for name, shape in BANKS[kind].shapes(size, head_dim).items():
            spread = 1.0 if name in ("keys", "values", "bias") else 0.4 if len(shape) == 1 else shape[-1] ** -0.5
            x = (rng.standard_normal(shape) * spread).astype(np.float32)
            if name.rpartition(".")[2] in ("keys", "w_in", "w_gate", "w_up", "skip"):
                x[..., unseen] = 0
            x = mx.array(x)
            if bits < 16 and len(shape) == 2 and shape[1] == head_dim:
                kept[name] = quantize(x, bits=bits)
                values[name] = dequantize(kept[name], bits=bits)
            else:
                dtype = mx.float32 if len(shape) == 1 else DTYPES.get(storage, mx.float16)
                kept[name] = values[name] = x.astype(dtype).astype(mx.float32)
        stored.append(kept)
        exact.append(values)
    return stored, exact


def softmax_part(scores, values):
    top = scores.max()
    weights = np.exp(scores - top)
    return weights @ values / weights.sum(), top + np.log(weights.sum())


def silu(x):
    return x / (1 + np.exp(-x))


def far_part(kind, head, q, scale):
    """(o, L) of one query in float64."""
    h = {n: np.array(a).astype(np.float64) for n, a in head.items()}
    if kind in ("quadrature", "corrected"):
        o, log = softmax_part(h["keys"] @ q * scale + h["bias"], h["values"])
        if kind == "quadrature":
            return o, log
        hidden = silu(h["w_gate"] @ q + h["b_gate"]) * (h["w_up"] @ q + h["b_up"])
        return o + hidden @ h["w_out"] + h["b_out"], log + hidden @ h["w_score"] + h["b_score"][0]
    out = []
    for name in ("target", "score"):
        p = {n.removeprefix(f"{name}."): a for n, a in h.items() if n.startswith(name)}
        hidden = silu(p["w_in"] @ q + p["b_in"])
        for layer in range(1, 9):
            if f"w_{layer}" in p:
                hidden = hidden + silu(p[f"w_{layer}"] @ hidden + p[f"b_{layer}"])
        out.append(hidden @ p["w_out"] + p["skip"] @ q + p["b_out"])
    return out[0], out[1][0]


def reference(kind, heads, queries, keys, values, scale, padding=None, offset=None):
    """Live keys are absolute, the heads' scores lack those of an offset [K, D]."""
    q, k, v = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (queries, keys, values))
    if offset is not None:
        k = k - np.array(offset).astype(np.float64)[:, None]
    B, H, T, _ = q.shape
    group, S = H // len(heads), k.shape[2]
    out = np.zeros_like(q)
    for b, h, t in np.ndindex(B, H, T):
        start = 0 if padding is None else padding[b]
        o, log = far_part(kind, heads[h // group], q[b, h, t], scale)
        seen = slice(start, S - T + t + 1)
        if seen.start < seen.stop:
            o_live, log_live = softmax_part(k[b, h // group, seen] @ q[b, h, t] * scale, v[b, h // group, seen])
            share = np.exp(log - np.logaddexp(log, log_live))
            o = share * o + (1 - share) * o_live
        out[b, h, t] = o
    return out


class Case:
    """One decode step. sizes: of the heads; live tokens are slices of longer buffers, as a cache hands them out.

    offset: [K, D], what the heads are relative to; common: a score that all keys have in common, by way of an offset.
    """

    def __init__(
        self, kind="quadrature", sizes=((40,), (5,)), head_dim=64, group=2, batch=1, length=1, live=9,
        element="float32", storage="float32", padding=None, blocks=6, fused=False, scale=None, seed=0, spread=1.0,
        common=None, offset=None,
    ):  # fmt: skip
        rng = np.random.default_rng(seed + 1)
        normal = lambda *shape: mx.array(rng.standard_normal(shape).astype(np.float32)).astype(DTYPES[element])  # noqa: E731
        self.kind, self.scale, self.padding, self.element = kind, scale or head_dim**-0.5, padding, element
        shared = slice(0, head_dim if common else 0, 8)  # columns that are alike in all keys
        if common:
            offset = rng.standard_normal((len(sizes), head_dim))
            level = mx.array((common / self.scale * 8 / head_dim) ** 0.5).astype(DTYPES[element])
            offset[:, shared] = level.item()
        stored, self.heads = make_heads(kind, sizes, head_dim, storage, seed, shared)
        self.offset = None if offset is None else mx.array(offset).astype(mx.float32)
        bank = BANKS[kind].stack(self.heads, scale=self.scale, offset=self.offset)
        bits = int(storage[3:]) if storage.startswith("int") else 16
        dtype = mx.float16 if bits < 16 else DTYPES[storage]
        backend = "cuda" if fused else BACKEND
        self.kernel = DecodeKernel(
            pack(bank, dtype=dtype, bits=bits, heads=stored, blocks=blocks, backend=backend, one_launch=fused)
        )
        K = len(sizes)
        self.queries = normal(batch, length, K * group, head_dim).swapaxes(1, 2) * spread
        self.keys, self.values = normal(batch, K, live + 7, head_dim), normal(batch, K, live + 5, head_dim)[:, :, :live]
        if common:
            self.queries[..., shared] = self.offset[0, 0].astype(DTYPES[element])
            self.keys[..., shared] = 0
        if offset is not None:
            self.keys = (self.keys + self.offset[:, None]).astype(DTYPES[element])
        self.keys = self.keys[:, :, 2 : live + 2]

    @property
    def packed(self):
        return self.kernel.packed

    def run(self):
        padding = None if self.padding is None else mx.array(self.padding, mx.int32)
        kernel = DecodeKernel(self.packed)  # whose plans are of this simulator
        return kernel.attend(self.queries, self.keys, self.values, left_padding=padding)

    def error(self):
        live = self.queries, self.keys, self.values
        want = reference(self.kind, self.heads, *live, self.scale, self.padding, self.offset)
        got = np.array(self.run().astype(mx.float32)).astype(np.float64)
        assert got.shape == want.shape
        return np.abs(got - want).max() / np.abs(want).max() if np.isfinite(got).all() else np.inf


WORK = {
    "quadrature": frozenset({WorkKind.NODES}),
    "corrected": frozenset({WorkKind.NODES, WorkKind.GATED}),
    "mlp": frozenset({WorkKind.LINEAR, WorkKind.PLAIN, WorkKind.SCORE}),
    "deep": frozenset({WorkKind.LINEAR, WorkKind.GIVEN, WorkKind.GIVEN_SCORE}),
}
SIZES = {
    "quadrature": ((40,), (105,), (1,)),
    "corrected": ((40, 13), (5, 30), (90, 1)),
    "mlp": ((40, 1, 13, 1), (25, 1, 30, 1), (70, 1, 1, 1)),
    "deep": ((40, 2, 13, 3), (25, 2, 30, 3), (64, 2, 7, 3)),
}
