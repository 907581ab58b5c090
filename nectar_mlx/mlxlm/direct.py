"""Modules that call MLX's attention by its own name (plamo2), and so give it no cache.

While such a module runs, its cache is known here, and in its file the name `mx` stands for MLX with our attention.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .class_source import mentions

_NAME = "mx.fast.scaled_dot_product_attention"
_cache: ContextVar[Any] = ContextVar("cache", default=None)
Attention = Callable[..., mx.array]


class _Standing:
    """Another object, but for some of its attributes."""

    def __init__(self, other: Any, **attributes: Any):
        self._other = other
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


def is_direct(kind: type[nn.Module]) -> bool:
    """Whether a class of modules calls MLX's attention by its name."""
    return kind.__module__.startswith("mlx_lm.models.") and mentions(kind, _NAME)


def reroute(kind: Any, attention: Attention) -> None:
    """Lets the class call `attention`, with its cache. Done once for a class."""
    if hasattr(kind.__call__, "stock"):
        return
    stock, signature = kind.__call__, inspect.signature(kind.__call__)

    def fast(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        return attention(queries, keys, values, _cache.get(), **{"mask": None, **options})

    @functools.wraps(stock)
    def call(self: Any, *args: Any, **named: Any) -> mx.array:
        token = _cache.set(signature.bind(self, *args, **named).arguments.get("cache"))
        try:
            result: mx.array = stock(self, *args, **named)
        finally:
            _cache.reset(token)
        return result

    call.stock = stock  # type: ignore[attr-defined]
    kind.__call__ = call
    vars(sys.modules[kind.__module__])["mx"] = _Standing(mx, fast=_Standing(mx.fast, scaled_dot_product_attention=fast))
