"""Reading a text by several ranks, layer after layer: each takes some pieces of it through a layer, behind the keys and
values that all ranks have made of the pieces before.

A piece goes through the very operations that a single process does, piece after piece, so the bytes are the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ..mlxlm.geometry import FULL, Geometry
from .distributed import World
from .layers import LayerRunner
from .prefill_attention import Prefill, ReadingCache


def can_be_shared(geometry: Geometry) -> bool:
    """Whether all that a layer keeps of a text are keys and values of all tokens."""
    return all(layer.kind == FULL and not layer.window and not layer.states for layer in geometry.layers)


def read_layers(
    runner: LayerRunner,
    tokens: mx.array,
    *,
    pieces: Sequence[slice],
    world: World,
    prefill: Prefill = "dense",
    progress: Callable[[int], None] = lambda n: None,
) -> list[KVCache]:
    """The cache of every layer that has read tokens [1, n], piece by piece. All ranks must call it."""
    n, count = tokens.shape[1], len(runner.model.layers)
    hidden = {piece.start: runner.embed(tokens[:, piece]) for piece in world.mine(pieces)}
    caches = list[KVCache]()
    for layer in range(count):

        def made(mine: Sequence[slice], layer: int = layer) -> list[dict[str, mx.array]]:
            return [_Asking(piece.start).asked(runner, layer, hidden[piece.start]) for piece in mine]

        every = world.shared(pieces, made)
        whole = _Whole(n, prefill=prefill)
        whole.keys, whole.values = (mx.concatenate([of[name] for of in every], axis=2) for name in ("keys", "values"))
        mx.eval(whole.keys, whole.values)
        for piece in world.mine(pieces):
            whole.offset = piece.start
            hidden[piece.start] = runner.layer(layer, hidden[piece.start], whole)
            mx.async_eval(hidden[piece.start])  # a GPU need not wait for the next one
        whole.offset = n
        caches.append(whole)
        progress(n * (layer + 1) // count)
    mx.clear_cache()
    return caches


class _Known(Exception):
    """A layer's keys and values are known, and what it does with them is not wanted."""


class _Asking(KVCache):
    """The cache of a layer that is asked for its keys and values of some tokens, at their positions."""

    def __init__(self, offset: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.offset = offset

    def asked(self, runner: LayerRunner, layer: int, hidden: mx.array) -> dict[str, mx.array]:
        try:
            runner.layer(layer, hidden, self)
        except _Known as known:
            keys, values = known.args
            return {"keys": keys, "values": values}
        raise AssertionError("the layer keeps no keys")

    def update_and_fetch(self, keys: Any, values: Any) -> Any:
        raise _Known(keys, values)


class _Whole(ReadingCache):
    """Keys and values of a whole text, of which a piece sees its own and those before."""

    keys: Any
    values: Any

    def update_and_fetch(self, keys: Any, values: Any) -> Any:
        end = self.offset + keys.shape[2]
        return self.keys[..., :end, :], self.values[..., :end, :]
