"""Routes the attention of a loaded mlx-lm model through our caches, once it is proven that this works (`probe`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..core.types import LayerCache
from ..errors import NectarError
from . import hook, probe
from .geometry import Geometry as Geometry


def route(model: nn.Module) -> Geometry:
    """Routes the model's attention through our caches and returns its geometry.

    NectarError that names the architecture and the reason where that cannot be proven: it would ignore the context
    silently.
    """
    return _described(model).geometry


def state_types(model: nn.Module) -> list[list[mx.Dtype]]:
    """Of every layer, the types of its keys and values and of each array of its state."""
    return _described(model).types


def _described(model: nn.Module) -> probe.Described:
    known: probe.Described | None = vars(model).get("_nectar_described")
    if known is None:
        name = str(getattr(model, "model_type", type(model).__module__))

        def make_stock() -> list[LayerCache]:
            return make_prompt_cache_of(model)

        hook.rebind(model)
        try:
            known = probe.describe(model, name, make_stock)
            probe.prove(model, known, make_stock)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise NectarError(
                f"{name} models are not supported: mlx-lm's code of them does not work with our caches ({reason})"
            ) from error
        vars(model)["_nectar_described"] = known
    return known


def compute_type(model: nn.Module) -> mx.Dtype:
    """The type of the model's activations, hence of its keys and values."""
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return next(p.dtype for _, p in parameters if mx.issubdtype(p.dtype, mx.floating))


def can_batch(model: nn.Module) -> bool:
    """Whether mlx-lm can decode sequences of several lengths together: the code of some models takes one position for
    all of them."""
    alone: list[list[Any]] = [make_prompt_cache_of(model) for _ in range(2)]
    try:
        for length, caches in enumerate(alone, 1):
            mx.eval(model(mx.zeros((1, length), dtype=mx.int32), cache=caches))
        together = [first.merge([first, second]) for first, second in zip(*alone, strict=True)]
        mx.eval(model(mx.zeros((2, 1), dtype=mx.int32), cache=together))
    except Exception:  # whatever that code raises
        return False
    return True


@contextmanager
def attached(model: nn.Module, make_cache: Callable[[], list[Any]]) -> Iterator[None]:
    """Inside, every mlx-lm entry point that makes a cache for the model gets it from `make_cache`."""
    route(model)
    before = vars(model).get("make_cache")
    model.make_cache = make_cache
    try:
        yield
    finally:
        del model.make_cache
        if before is not None:
            model.make_cache = before


def make_prompt_cache_of(model: nn.Module) -> list[LayerCache]:
    """The model's own caches, even while a context is attached to it."""
    attached = vars(model).get("make_cache")
    if attached is None:
        return make_prompt_cache(model)
    del model.make_cache
    try:
        return make_prompt_cache(model)
    finally:
        model.make_cache = attached
