"""How sure a mean is: the bootstrap over conversations, whose tokens are not independent."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over answer tokens and its 95% interval: the bootstrap over conversations, whose tokens are not
    independent."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Resamples of conversations, the same ones for every statistic, so that ratios and differences are paired.

    conversations: the distinct conversations that the tokens belong to. draws: how many resamples.
    """

    def __init__(self, conversations: Sequence[int] | np.ndarray, *, draws: int = 1000, seed: int = 0):
        self.conversations = np.unique(conversations)
        count = len(self.conversations)
        drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=draws)
        self._weights = np.concatenate([np.ones((1, count)), drawn])  # the first row is the sample itself

    def means(self, values: np.ndarray, conversation: np.ndarray) -> np.ndarray:
        """The mean of values [tokens] in the sample itself and in every resample, [1 + draws]."""
        index = np.searchsorted(self.conversations, conversation)
        count = len(self.conversations)
        totals = np.bincount(index, weights=values.astype(np.float64), minlength=count)
        tokens = np.bincount(index, minlength=count)
        return np.asarray((self._weights @ totals) / np.maximum(self._weights @ tokens, 1))

    def mean(self, values: np.ndarray, conversation: np.ndarray) -> Estimate:
        return interval(self.means(values, conversation))


def interval(statistic: np.ndarray) -> Estimate:
    """A statistic of the sample and its resamples, [1 + draws] -> its value and the 95% percentile interval."""
    low, high = np.quantile(statistic[1:], [0.025, 0.975])
    return Estimate(float(statistic[0]), float(low), float(high))
