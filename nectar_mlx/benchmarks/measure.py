"""A model's decode step with the context's cache in several variants; all weights and keys are random."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from ..heads import Bank, Corrected, Quadrature, Size, TargetScore
from ..mlxlm import attention_patch

DTYPE = mx.bfloat16
CACHE_STEP = 256  # live positions that mlx-lm's caches allocate at a time


class Heads(NamedTuple):
    """Query heads, KV heads, and the size of a head."""

    query: int
    kv: int
    dim: int


class Widths(NamedTuple):
    """Of the hidden states, the MLP and the vocabulary."""

    hidden: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide the speed of a decode step. batch: sequences that share the context."""

    name: str
    layers: int
    heads: Heads
    widths: Widths
    batch: int = 1

    @property
    def n_heads(self) -> int:
        return self.heads.query

    @property
    def n_kv_heads(self) -> int:
        return self.heads.kv

    @property
    def head_dim(self) -> int:
        return self.heads.dim

    @property
    def vocabulary(self) -> int:
        return self.widths.vocabulary

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def cache_bytes(self, tokens: int) -> int:
        """Of 16-bit keys and values, all layers and sequences."""
        return self.batch * self.layers * self.n_kv_heads * tokens * self.head_dim * 4

    def model(self) -> nn.Module:
        arguments = qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=self.widths.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.widths.intermediate,
            num_attention_heads=self.n_heads,
            rms_norm_eps=1e-6,
            vocab_size=self.vocabulary,
            num_key_value_heads=self.n_kv_heads,
            max_position_embeddings=1 << 20,
            rope_theta=1e6,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
        )
        model = qwen3.Model(arguments)
        model.set_dtype(DTYPE)
        mx.eval(model.parameters())
        return model


SHAPES = {
    s.name: s
    for s in (
        Shape("toy", 2, Heads(4, 2, 64), Widths(128, 256, 512)),
        Shape("qwen3-1.7b", 28, Heads(16, 8, 128), Widths(2048, 6144, 151936)),
        Shape("qwen3-4b", 36, Heads(32, 8, 128), Widths(2560, 9728, 151936)),
        Shape("qwen3-8b", 36, Heads(32, 8, 128), Widths(4096, 12288, 151936)),
    )
}


def random_bank(shape: Shape, nodes: int, units: int = 0, *, seed: int = 0) -> Bank:
    """Heads of `nodes` nodes on average (in turn 2/5 and 8/5 of it), and of `units` gated hidden units each."""
    counts = _uneven(nodes, shape.n_kv_heads)
    if units:
        return _random(Corrected, [(count, units) for count in counts], shape, seed)
    return _random(Quadrature, [(count,) for count in counts], shape, seed)


def random_networks(shape: Shape, units: int, layers: int, *, seed: int = 0) -> Bank:
    """Target networks of `units` hidden units a layer (in turn 2/5 and 8/5 of it), score networks of a third."""
    counts = _uneven(units, shape.n_kv_heads)
    return _random(TargetScore, [(n, layers, -(-n // 3), layers) for n in counts], shape, seed)


def _uneven(mean: int, heads: int) -> list[int]:
    """In turn 8/5 and 2/5 of the mean: heads of a file differ in size."""
    return [mean * (2 if k % 2 else 8) // 5 for k in range(heads)]


def _random(kind: type[Bank], sizes: Sequence[Size], shape: Shape, seed: int) -> Bank:
    rng = np.random.default_rng(seed)
    heads = []
    for size in sizes:
        shapes = kind.shapes(size, shape.head_dim)
        spread = {n: 1.0 if n in ("keys", "values", "bias") else 0.1 for n in shapes}
        heads.append({n: mx.array((rng.standard_normal(s) * spread[n]).astype(np.float32)) for n, s in shapes.items()})
    return kind.stack(heads, scale=shape.scale)


def timed(work: Callable[[], mx.array | list[mx.array]], *, repeats: int = 20, warm: int = 3) -> float:
    """Median seconds of building and evaluating what `work` returns."""
    for _ in range(warm):
        mx.eval(work())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(work())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def queued(step: Callable[[mx.array], mx.array], first: mx.array, *, repeats: int = 20, warm: int = 3) -> float:
    """Median seconds of a step. As in mlx-lm's loop, the next step is queued before the current one is waited for.

    A step's argument is the previous step's result; `first` is the argument of the first step.
    """
    now = step(first)
    mx.async_eval(now)
    seconds = []
    for _ in range(warm + repeats):
        start = time.perf_counter()
        following = step(now)
        mx.async_eval(following)
        mx.eval(now)
        now = following
        seconds.append(time.perf_counter() - start)
    mx.eval(now)
    return statistics.median(seconds[warm:])


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    on_cpu = mx.default_device() == mx.cpu
    x = mx.random.normal((1 << (22 if on_cpu else 27),))
    mx.eval(x)
    return 2 * x.nbytes / timed(lambda: x + 1.0, repeats=5)


def memory() -> int:
    """Bytes of the device's memory, or a large number if it is not known."""
    info = mx.device_info()
    return int(info.get("memory_size") or info.get("total_memory") or 1 << 50)


def routed(shape: Shape) -> nn.Module:
    """The shape's model, with its attention routed through our caches."""
    model = shape.model()
    attention_patch.route(model)
    return model


def nbytes_of(model: nn.Module) -> int:
    """Of its weights."""
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return sum(x.nbytes for _, x in weights)
