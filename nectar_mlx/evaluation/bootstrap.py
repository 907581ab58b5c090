"""Confidence intervals of means: the bootstrap over conversations, whose tokens are not independent."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..core.types import AnyArray, DoubleArray


class Estimate(NamedTuple):
    """A mean over answer tokens and the ends of its 95% interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Resamples of conversations, the same ones for every statistic, so that ratios and differences are paired.

    conversations: the distinct conversations that the tokens belong to. draws: how many resamples.
    """

    def __init__(self, conversations: Sequence[int] | AnyArray, *, draws: int = 1000, seed: int = 0):
        self.conversations = np.unique(conversations)
        count = len(self.conversations)
        drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=draws)
        self._weights = np.concatenate([np.ones((1, count)), drawn])  # the first row is the sample itself

    def means(self, values: AnyArray, conversation: AnyArray) -> DoubleArray:
        """The mean of values [tokens] in the sample itself and in every resample, [1 + draws]."""
        index = np.searchsorted(self.conversations, conversation)
        count = len(self.conversations)
        totals = np.bincount(index, weights=values.astype(np.float64), minlength=count)
        tokens = np.bincount(index, minlength=count)
        return np.asarray((self._weights @ totals) / np.maximum(self._weights @ tokens, 1))

    def mean(self, values: AnyArray, conversation: AnyArray) -> Estimate:
        return interval(self.means(values, conversation))


def interval(statistic: DoubleArray) -> Estimate:
    """A statistic of the sample and its resamples, [1 + draws] -> its value and the 95% percentile interval."""
    low, high = np.quantile(statistic[1:], [0.025, 0.975])
    return Estimate(float(statistic[0]), float(low), float(high))
