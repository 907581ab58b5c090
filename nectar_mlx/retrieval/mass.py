"""How much of a prompt's attention goes to a context, as its heads predict: exp(L_context - L_all)."""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..core.attention import Partial
from ..heads import Bank
from ..mlxlm.cache import NectarCache, Window, make_caches


class _MassCache(NectarCache):
    """Keeps the last call's mass [B, H, T]."""

    mass: mx.array | None = None

    def over_context(self, queries: mx.array) -> Partial:
        part = super().over_context(queries)
        self._context_normalizer = part.log_normalizer
        return part

    def observe(self, log_normalizer: mx.array) -> None:
        self.mass = mx.exp(self._context_normalizer - log_normalizer)


def attention_mass(
    model: nn.Module, banks: Sequence[Bank], windows: Mapping[int, Window], start: int, prompt: Sequence[int]
) -> float:
    """The mean over the prompt's tokens and all heads with full attention; in [0, 1].

    banks, windows, start: as for `make_caches`. prompt: the token ids that follow the context.
    """
    caches = make_caches(banks, windows, start, make=_MassCache)
    logits = model(mx.array([list(prompt)]), cache=caches)
    masses = [cache.mass.mean() for cache in caches if isinstance(cache, _MassCache) and cache.mass is not None]
    mean = mx.stack(masses).mean()
    mx.eval(mean, logits)
    return float(mean.item())
