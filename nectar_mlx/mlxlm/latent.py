"""Latent attention (DeepSeek-V2, arXiv 2405.04434): a token keeps one vector for all heads.

With the key's projection absorbed into the query, a head's query is (q · W, q_position), the key of a token is (latent
vector, key with the position), of 512 + 64 numbers, and its value is the latent vector. That is attention with one KV
head, so heads of every kind fit it. mlx-lm's modules compute it in several ways and give their attention call a part of
the scores as a mask; where the cache is ours, they are called through `attend`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .class_source import mentions


def is_latent(kind: type[nn.Module]) -> bool:
    """Whether a class of modules is latent attention whose cache holds latent vectors."""
    return mentions(kind, "self.embed_q", "self.unembed_out", "self.kv_a_proj_with_mqa")


def routed(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A module's `__call__`, which takes `attend` where the cache has an `attend` of its own."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def call(self: Any, *args: Any, **named: Any) -> mx.array:
        given = signature.bind(self, *args, **named).arguments
        cache = given.get("cache")
        if not hasattr(cache, "attend"):
            return stock(self, *args, **named)
        return attend(self, given["x"], given.get("mask"), cache, given.get("attn_scale"))

    call.stock = stock  # type: ignore[attr-defined]
    return call


def attend(
    module: Any, x: mx.array, mask: mx.array | str | None, cache: Any, query_scale: mx.array | None = None
) -> mx.array:
    """What the module makes of hidden states [B, T, E] behind the cache. query_scale: by which queries are multiplied
    (mistral4)."""
    B, T, _ = x.shape
    rank, rope = module.kv_lora_rank, getattr(module, "rope", None)
    low = getattr(module, "q_a_proj", None)
    projected = module.q_proj(x) if low is None else module.q_b_proj(module.q_a_layernorm(low(x)))
    queries = projected.reshape(B, T, module.num_heads, -1).transpose(0, 2, 1, 3)
    plain, positional = mx.split(queries, [module.qk_nope_head_dim], axis=-1)
    compressed, key = mx.split(module.kv_a_proj_with_mqa(x), [rank], axis=-1)
    latent, key = module.kv_a_layernorm(compressed)[:, None], key[:, None]
    if rope is not None:
        positional, key = rope(positional, cache.offset), rope(key, cache.offset)
    if query_scale is not None:
        plain, positional = plain * query_scale, positional * query_scale
    latent, key = cache.update_and_fetch(latent, key)
    queries = mx.concatenate([module.embed_q(plain), positional], axis=-1)
    keys = mx.concatenate([latent, key], axis=-1)
    output = module.unembed_out(cache.attend(queries, keys, latent, scale=module.scale, mask=mask))
    output = output.transpose(0, 2, 1, 3)
    if "g_proj" in module:  # a gate for each head, or for each of its numbers
        gate = mx.sigmoid(module.g_proj(x).astype(mx.float32)).astype(output.dtype)
        output = output * gate.reshape(B, T, module.num_heads, -1)
    project = module.o_proj if "o_proj" in module else module.dense
    result: mx.array = project(output.reshape(B, T, -1))
    return result
