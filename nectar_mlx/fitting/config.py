"""What can be chosen when fitting."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from ..core.device import Device, device
from ..core.types import JsonObject
from ..errors import NectarError
from ..heads import ALIASES, KINDS
from ..store import BITS
from .prefill_attention import Prefill

_COUNTS = ("answer_tokens", "batch", "checks", "conversations", "matching_samples")
_POSITIVE = ("sample_share", "temperature", "rate")
FEWEST_SAMPLES = 20_000  # a head, of those that are useful, however little memory there is
_MOST_BYTES = 9_000_000_000  # of samples in a fit of normal effort, unless another limit is set
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
    queries: captured samples a head (default: `useful_samples`).
    sample_share: of the samples that a fit takes by default.
    steps, batch, rate: of the regression; rate's default is the kind's.
    seed: of everything that is drawn. Equal fits give equal files.
    context_tokens: cut the text after so many tokens.
    memory: bytes that the KV cache of the context, or of a chunk of it, may take before the fit goes layer by layer,
        and captured samples before they go to disk (default: half of what is free).
    layerwise: whether it goes layer by layer whatever the memory.
    prefill: how the text is read, dense, or fixed (sparsely, for texts whose dense prefill takes too long).
    answer_tokens, temperature: of the sampled answers that the fit learns from; on a CPU those to short questions
        are longer (`self_study.longest_answers`).
    conversations: sampled side by side, at most.
    checks: questions that a finished file is checked with.
    power: of the errors that bytes follow (default: 0.6, below a budget of 1% 0.75).
    trial_steps: of the short fit that decides the sizes of heads.
    matching_samples: that Attention Matching solves on.
    distillation_steps: of training the heads through the whole model, after the regression, where the budget is below
        1% (default: none). 0: asked for, on a machine that is too slow for it.
    keep_study: whether the file keeps the conversations, so that a changed text is fitted again for less.
    """

    budget: float | Literal["auto"] = "auto"
    size: int | None = None
    kind: str = "auto"
    bits: int | None = None
    queries: int | None = None
    sample_share: float = 1.0
    steps: int = field(default_factory=lambda: device().fit_steps)
    seed: int = 0
    context_tokens: int | None = None
    memory: int | None = None
    layerwise: bool | None = None
    prefill: Prefill = "dense"
    answer_tokens: int = field(default_factory=lambda: device().fit_answer_tokens)
    checks: int = field(default_factory=lambda: device().fit_checks)
    temperature: float = 0.9
    conversations: int = field(default_factory=lambda: device().fit_conversations)
    power: float | None = None
    trial_steps: int = field(default_factory=lambda: device().fit_trial_steps)
    rate: float | None = None
    batch: int = field(default_factory=lambda: device().fit_batch)
    matching_samples: int = field(default_factory=lambda: device().fit_matching)
    distillation_steps: int | None = None
    keep_study: bool = False

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
            raise NectarError(f"unknown kind {self.kind!r}: choose one of auto, {', '.join(KINDS)}")
        if self.prefill not in ("dense", "fixed"):
            raise NectarError(f"unknown prefill {self.prefill!r}: choose dense or fixed")
        for name in ("size", "queries", "seed", "steps", "context_tokens", "memory", "distillation_steps", *_COUNTS):
            value = getattr(self, name)
            if value is not None and value < (0 if name in ("seed", "distillation_steps") else 1):
                raise NectarError(f"{name} must be positive, not {value}")
        for name in _POSITIVE:
            if (number := getattr(self, name)) is not None and not 0 < number < math.inf:
                raise NectarError(f"{name} must be positive, not {number:g}")
        if self.seed >= 1 << 63:  # other seeds are derived from it, and MLX takes 64 bits
            raise NectarError(f"seed must be below 2^63, not {self.seed}")


def useful_samples(config: FitConfig, profile: Device, *, group: int, nbytes: int, memory: int) -> int:
    """Samples a head by default: as many as are useful and the memory holds.

    group: query heads that share a KV head. nbytes: of one sample of all heads. memory: bytes that the machine has.
    """
    wanted = round(max(profile.fit_samples, profile.fit_tokens * group) * config.sample_share)
    room = config.memory or min(round(_MOST_BYTES * max(1.0, config.sample_share)), memory // 8)
    return max(min(FEWEST_SAMPLES, wanted), min(wanted, room // nbytes))


def density(config: FitConfig, profile: Device, *, group: int, samples: int, distilled: bool) -> float:
    """Share of the tokens of conversations whose samples are kept: a few of many conversations tell more than all of
    a few. All, where their number was chosen. group: as above. samples: a head. distilled: whether heads are trained on
    whole conversations, too, which takes more of them."""
    if config.queries:
        return 1.0
    fewest = profile.distilled_tokens if distilled else profile.fewest_tokens
    return min(1.0, samples / max(1.0, fewest * config.sample_share * group))


EFFORTS = ("quick", "normal", "best")


def effort(name: str) -> JsonObject:
    """What an effort stands for, as fields of a `FitConfig`: fewer or more samples and steps. NectarError for a name
    that there is not."""
    if name not in EFFORTS:
        raise NectarError(f"unknown effort {name!r}: choose {', '.join(EFFORTS)}")
    steps = device().fit_steps
    if name == "quick":
        return {"steps": steps // 3, "sample_share": 0.3}
    if name == "normal":
        return {}
    distillation = device().distillation_steps
    return {"steps": 20 * steps // 3, "sample_share": 4.0, "rate": 2e-2, "distillation_steps": distillation}


def parse_budget(text: str) -> JsonObject:
    """What a person writes, "auto", "0.02", "2%" or "20M", as fields of a `FitConfig`. NectarError for all else."""
    if text.strip() == "auto":
        return {"budget": "auto"}
    number, unit = _number_and_unit(text)
    if not math.isfinite(number):
        raise NectarError(f"a budget is auto, a share such as 0.02 or 2%, or a size such as 500K or 20M, not {text!r}")
    if unit in ("", "%"):
        return {"budget": number / 100 if unit else number}
    return {"size": _bytes(number, unit)}


def parse_size(text: str) -> int:
    """Bytes from "20M", "500K" or "5000B". NectarError for all else: a number alone could be meant as a share."""
    number, unit = _number_and_unit(text)
    if not math.isfinite(number) or unit in ("", "%"):
        raise NectarError(f"a size is a number with a unit, such as 20M, 500K or 5000B, not {text!r}")
    return _bytes(number, unit)


def _number_and_unit(text: str) -> tuple[float, str]:
    """NaN where there is none."""
    match = re.fullmatch(r"\s*(-?[\d.]+(?:e-?\d+)?)\s*(%|B|[kKMG]B?|)\s*", text)
    try:
        return (float(match[1]), match[2]) if match else (math.nan, "")
    except ValueError:
        return math.nan, ""


def _bytes(number: float, unit: str) -> int:
    return int(min(number * 1000 ** "BKMG".index(unit[0].upper()), _LARGEST_SIZE))
