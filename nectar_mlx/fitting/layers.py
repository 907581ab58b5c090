"""A model's layers one at a time, so that only one layer's keys and values need to exist.

mlx-lm's models run all their layers in one call. Here the layers are called one by one; what stands before the first
(embeddings, their scale) and after the last (norm, logits) is had from the model itself, its layers replaced by a
function. Hidden states are [B, T, E].
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, create_ssm_mask
from mlx_lm.models.cache import CacheList, RotatingKVCache, make_prompt_cache

from ..errors import NectarError
from ..mlxlm.geometry import STATE, Geometry
from . import finite


class LayerRunner:
    """The layers of a model; `width` is E.

    NectarError names an architecture that does more between its layers than call them.
    """

    def __init__(self, model: nn.Module, geometry: Geometry):
        self.model, self._kinds = model, geometry.layers
        self._layers: list[Any] = list(model.layers)
        reason = f"{geometry.model_type} models cannot be fitted layer by layer or in chunks: their layers share more"
        if len(self._layers) != geometry.n_layers:
            raise NectarError(reason)
        # Behind other tokens, as in every use: some models tell their layers, or the embedding, where these end.
        tokens, caches = mx.zeros((1, 3), dtype=mx.int32), make_prompt_cache(model)
        with _windows_asked(caches) as self._windows:
            model(tokens, cache=caches)
        expected = model(tokens, cache=copy.deepcopy(caches))
        finite.check_logits(expected)
        try:
            hidden = self.embed(tokens)
            self.width: int = hidden.shape[-1]
            for layer in range(len(self._layers)):
                hidden = self.layer(layer, hidden, caches[layer])
            logits = self.logits(hidden)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # called in another way
            raise NectarError(reason) from None
        if not mx.allclose(logits, expected, rtol=1e-2, atol=1e-2):
            raise NectarError(reason)

    @property
    def steps_as_it_reads(self) -> bool:
        """Whether tokens that are fed one by one see what they see together. Those of mlx-lm's plamo3 do not: its masks
        reach further than its caches."""
        return all(asked == kept for kept, asked in self._windows.items())

    def embed(self, tokens: mx.array) -> mx.array:
        """What the first layer sees of tokens [B, T]."""
        inputs: list[mx.array] = []

        def keep(layer: Any, hidden: mx.array, *others: Any, **named: Any) -> mx.array:
            inputs.append(hidden)
            return hidden

        with self.patched_layers(keep):
            self.model(tokens)  # never evaluated: the logits that follow cost nothing
        return inputs[0]

    def layer(self, layer: int, hidden: mx.array, cache: Any) -> mx.array:
        """Through one layer, behind what its cache holds."""
        kind = self._kinds[layer]
        if kind.kind == STATE:
            mask = create_ssm_mask(hidden, cache)
        else:
            mask = create_attention_mask(hidden, cache, window_size=self._windows.get(kind.window))
        result: mx.array = self._layers[layer](hidden, mask, cache)
        return result

    def through(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """What the last layer gives for tokens [B, T] in the model's own call, whose logits are not computed."""
        calls: dict[Any, Any] = {type(layer): type(layer).__call__ for layer in self._layers}
        outputs: list[mx.array] = []

        def keep(layer: Any, *arguments: Any, **named: Any) -> mx.array:
            outputs[:] = [calls[type(layer)](layer, *arguments, **named)]
            return outputs[0]

        with self.patched_layers(keep):
            self.model(tokens, cache=cache)
        return outputs[0]

    def logits(self, hidden: mx.array) -> mx.array:
        """What follows the last layer: [B, T, E] -> [B, T, V]."""
        with self.patched_layers(lambda layer, before, *others, **named: hidden):
            result: mx.array = self.model(mx.zeros(hidden.shape[:2], dtype=mx.int32))
        return result

    @contextmanager
    def patched_layers(self, call: Callable[..., mx.array]) -> Iterator[None]:
        """Inside, every layer of the model is `call`."""
        kinds: dict[Any, Any] = {type(layer): type(layer).__call__ for layer in self._layers}
        for kind in kinds:
            kind.__call__ = call
        try:
            yield
        finally:
            for kind, original in kinds.items():
                kind.__call__ = original


@contextmanager
def _windows_asked(caches: Sequence[Any]) -> Iterator[dict[int, int]]:
    """For the keys that sliding windows keep, those that the model's own masks ask for: plamo3's are one more. The
    model is called inside."""
    asked: dict[int, int] = {}
    parts = [part for cache in caches for part in (cache.caches if isinstance(cache, CacheList) else [cache])]
    rings: list[Any] = [part for part in parts if isinstance(part, RotatingKVCache)]

    def recording(ring: Any) -> Callable[..., Any]:
        own = ring.make_mask

        def make_mask(*arguments: Any, **named: Any) -> Any:
            asked[ring.max_size] = named.get("window_size") or ring.max_size
            return own(*arguments, **named)

        return make_mask

    for ring in rings:
        asked[ring.max_size] = ring.max_size
        ring.make_mask = recording(ring)
    try:
        yield asked
    finally:
        for ring in rings:
            del ring.make_mask


def layer_runner(model: nn.Module, geometry: Geometry) -> LayerRunner | None:
    """The layers of a model; None where they are not called one by one."""
    try:
        return LayerRunner(model, geometry)
    except NectarError:
        return None
