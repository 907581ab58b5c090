"""How the next token is chosen: numbers that are checked before they reach MLX, and what mlx-lm makes of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from ..errors import NectarError

if TYPE_CHECKING:
    import mlx.core as mx

_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 5),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
    "repetition_penalty": (0.01, 10),
    "presence_penalty": (-10, 10),
    "frequency_penalty": (-10, 10),
    "penalty_window": (1, 100_000),
    "seed": (-(2**63), 2**64 - 1),
}
_WHOLE = ("top_k", "penalty_window", "seed")
MAX_BIASES, MAX_BIAS = 1024, 100.0
_COLDEST = 1e-3  # below it, sampling is greedy: 1 / temperature would overflow

Sampler = Callable[["mx.array"], "mx.array"]
Processor = Callable[["mx.array", "mx.array"], "mx.array"]


class SamplingError(NectarError):
    """A number out of its bounds. name: of the field."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Fields are those of mlx-lm's samplers and logits processors; SamplingError for a number out of its bounds.

    temperature: 0 takes the likeliest token. top_p, top_k, min_p: sample from the likeliest tokens of this mass, from
    so many of them, from those of at least this probability relative to the likeliest; 1, 0 and 0 are all. xtc_*:
    leaves out the likeliest above the threshold, with this probability. *_penalty: on tokens among the last
    `penalty_window` ones. logit_bias: added to the logits, by token. seed: equal seeds give equal samples.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name in _BOUNDS and (value := getattr(self, f.name)) is not None:
                _check(f.name, value)
        if len(self.logit_bias) > MAX_BIASES:
            raise SamplingError("logit_bias", f"logit_bias has more than {MAX_BIASES:,} tokens")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or token < 0 or not _is_number(bias) or abs(bias) > MAX_BIAS:
                raise SamplingError("logit_bias", f"logit_bias must give tokens a number from -{MAX_BIAS:g} to 100")

    def check_vocabulary(self, size: int) -> None:
        """SamplingError for tokens that a vocabulary of this size does not have."""
        if any(token >= size for token in self.logit_bias):
            raise SamplingError("logit_bias", f"logit_bias: the vocabulary has {size:,} tokens")

    @property
    def greedy(self) -> bool:
        return self.temperature < _COLDEST

    def sampler(self) -> Sampler:
        """Takes log-probabilities [B, V] and returns tokens [B]. With a seed it has random numbers of its own, so that
        other requests do not change what it draws."""
        import mlx.core as mx
        from mlx_lm import sample_utils

        if self.greedy:
            return sample_utils.greedy_sampler
        keys = _Keys(self.seed)

        def sample(logprobs: mx.array) -> mx.array:
            if 0 < self.top_p < 1:
                logprobs = sample_utils.apply_top_p(logprobs, self.top_p)
            if self.min_p > 0:
                logprobs = sample_utils.apply_min_p(logprobs, self.min_p)
            if self.xtc_probability > 0:
                logprobs = _without_top(logprobs, self.xtc_probability, self.xtc_threshold, keys.next())
            if 0 < self.top_k < logprobs.shape[-1]:
                logprobs = sample_utils.apply_top_k(logprobs, self.top_k)
            return mx.random.categorical(logprobs / self.temperature, key=keys.next())

        return sample

    def processors(self) -> list[Processor]:
        """What changes logits [1, V] before they are sampled, given the tokens so far [T]."""
        from mlx_lm.sample_utils import make_logits_processors

        size = self.penalty_window
        return make_logits_processors(
            logit_bias=dict(self.logit_bias) or None,
            repetition_penalty=None if self.repetition_penalty == 1 else self.repetition_penalty,
            repetition_context_size=size,
            presence_penalty=self.presence_penalty,
            presence_context_size=size,
            frequency_penalty=self.frequency_penalty,
            frequency_context_size=size,
        )


class _Keys:
    """A sequence of random keys from a seed; without one each is None, which is MLX's own sequence."""

    def __init__(self, seed: int | None):
        import mlx.core as mx

        self._key = None if seed is None else mx.random.key(seed % 2**64)

    def next(self) -> "mx.array | None":
        import mlx.core as mx

        if self._key is None:
            return None
        self._key, key = mx.random.split(self._key)
        return key


def _without_top(logprobs: "mx.array", probability: float, threshold: float, key: "mx.array | None") -> "mx.array":
    """XTC: all tokens above the threshold but the least likely of them are left out, with a probability. mlx-lm's takes
    no key."""
    import mlx.core as mx

    probabilities = mx.softmax(logprobs, axis=-1)
    least = mx.where(probabilities > threshold, probabilities, mx.inf).min(axis=-1, keepdims=True)
    left_out = (probabilities > least) & (mx.random.uniform(key=key) < probability)
    return mx.where(left_out, -mx.inf, logprobs)


def _check(name: str, value: object) -> None:
    low, high = _BOUNDS[name]
    kind = "a whole number" if name in _WHOLE else "a number"
    if not _is_number(value) or (name in _WHOLE and type(value) is not int) or not low <= value <= high:  # type: ignore[operator]
        raise SamplingError(name, f"{name} must be {kind} from {low:g} to {high:g}")


def _is_number(value: object) -> bool:
    """Whether it is an int or a finite float: no bool, no NaN, nothing of 400 digits."""
    if type(value) is int:
        return abs(value) < 2**65
    return type(value) is float and math.isfinite(value)
