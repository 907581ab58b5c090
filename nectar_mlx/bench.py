"""Speed. `decode`: a decode step against other ways of keeping a context; `selftest`: every kernel, right and how fast."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .heads import Bank, Corrected, Quadrature


@dataclass(frozen=True)
class Shape:
    """What of a model matters to the speed of a decode step."""

    name: str
    layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    batch: int = 1

    @staticmethod
    def of(name: str) -> "Shape":
        return SHAPES[name]


SHAPES = {
    s.name: s
    for s in (
        Shape("qwen3-1.7b", 28, 16, 8, 128, 2048, 6144, 151936),
        Shape("qwen3-4b", 36, 32, 8, 128, 2560, 9728, 151936),
        Shape("qwen3-8b", 36, 32, 8, 128, 4096, 12288, 151936),
    )
}


def random_bank(shape: Shape, nodes: int, units: int = 0, *, seed: int = 0) -> Bank:
    """Heads of `nodes` nodes on average (from 2/5 to 8/5 of it) and `units` gated hidden units."""
    kind = Corrected if units else Quadrature
    rng = np.random.default_rng(seed)
    heads = []
    for k in range(shape.n_kv_heads):
        size = (nodes * (2 if k % 2 else 8) // 5, units)
        shapes = kind.shapes(size if units else size[:1], shape.head_dim)
        spread = {n: 1.0 if n in ("keys", "values", "bias") else 0.1 for n in shapes}
        heads.append({n: mx.array((rng.standard_normal(s) * spread[n]).astype(np.float32)) for n, s in shapes.items()})
    return kind.stack(heads, scale=shape.head_dim**-0.5)
