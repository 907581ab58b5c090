"""What can be chosen when fitting."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from ..core.device import device
from ..core.types import JsonObject
from ..errors import NectarError
from ..heads import ALIASES, KINDS
from ..store import BITS
from .prefill_attention import Prefill

_LARGEST_SIZE = 1e18  # bytes; more is taken for as many


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """What can be chosen when fitting. Defaults that depend on the machine come from its profile (`core.device`).

    budget: bytes kept / bytes of the bf16 KV cache, or "auto": the smallest at which answers are expected to be close
        to the full cache's (`auto_budget`).
    size: bytes to keep, instead of a budget.
    kind: of head function: auto (quadrature), or one of `heads.KINDS`.
    bits: of a stored matrix entry, 16 or 4 to 8, rounded at once. Default: the kind's own; nodes alone are rounded
        while they are trained, each row in as many bits as it needs, 4 on average.
    queries: captured samples a head (default: 20,000; on a GPU up to 120,000, as the memory holds).
    steps, batch, rate: of the regression; rate's default is the kind's.
    seed: of everything that is drawn. Equal fits give equal files.
    context_tokens: cut the text after so many tokens.
    memory: bytes that the KV cache of the context, or of a chunk of it, may take before the fit goes layer by layer,
        and captured samples before they go to disk (default: half of what is free).
    layerwise: whether it goes layer by layer whatever the memory.
    prefill: how the text is read, dense, or fixed (sparsely, for texts whose dense prefill takes too long).
    answer_tokens, temperature: of the sampled answers that the fit learns from.
    conversations: sampled side by side, at most.
    checks: questions that a finished file is checked with.
    power: of the errors that bytes follow (default: 0.6, below a budget of 1% 0.75).
    trial_steps: of the short fit that decides the sizes of heads.
    matching_samples: that Attention Matching solves on.
    """

    budget: float | Literal["auto"] = "auto"
    size: int | None = None
    kind: str = "auto"
    bits: int | None = None
    queries: int | None = None
    steps: int = field(default_factory=lambda: device().fit_steps)
    seed: int = 0
    context_tokens: int | None = None
    memory: int | None = None
    layerwise: bool | None = None
    prefill: Prefill = "dense"
    answer_tokens: int = 96
    checks: int = field(default_factory=lambda: device().fit_checks)
    temperature: float = 0.9
    conversations: int = field(default_factory=lambda: device().fit_conversations)
    power: float | None = None
    trial_steps: int = 100
    rate: float | None = None
    batch: int = field(default_factory=lambda: device().fit_batch)
    matching_samples: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", ALIASES.get(self.kind, self.kind))
        if self.budget != "auto" and not 0 < self.budget <= 1:
            raise NectarError(
                f"a budget of {self.budget:g} is not in (0, 1]: it is the share of the KV cache to keep, such as 0.02 "
                "or 2%; or give a size such as 20M, or auto"
            )
        if self.bits not in (None, *BITS):
            raise NectarError(f"{self.bits} bits are not supported: choose {', '.join(map(str, BITS))}")
        if self.kind not in ("auto", *KINDS):
            raise NectarError(f"unknown kind {self.kind!r}: choose one of auto, {', '.join([*KINDS, *ALIASES])}")
        if self.prefill not in ("dense", "fixed"):
            raise NectarError(f"unknown prefill {self.prefill!r}: choose dense or fixed")
        for name in ("size", "queries", "seed", "steps", "context_tokens", "memory"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "seed" else 1):
                raise NectarError(f"{name} must be positive, not {value}")
        if self.seed >= 1 << 63:  # other seeds are derived from it, and MLX takes 64 bits
            raise NectarError(f"seed must be below 2^63, not {self.seed}")


def parse_budget(text: str) -> JsonObject:
    """What a person writes, "auto", "0.02", "2%" or "20M", as fields of a `FitConfig`. NectarError for all else."""
    match = re.fullmatch(r"\s*(-?[\d.]+(?:e-?\d+)?)\s*(%|[kKMG]B?)?\s*", text)
    if text.strip() == "auto":
        return {"budget": "auto"}
    try:
        number, unit = (float(match[1]), match[2] or "") if match else (math.nan, "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise NectarError(f"a budget is auto, a share such as 0.02 or 2%, or a size such as 500K or 20M, not {text!r}")
    if unit and unit != "%":
        return {"size": int(min(number * 1000 ** " KMG".index(unit[0].upper()), _LARGEST_SIZE))}
    return {"budget": number / 100 if unit else number}
