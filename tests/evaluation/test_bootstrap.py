"""Intervals cover what they should."""

import numpy as np
import pytest

from nectar_mlx.evaluation.bootstrap import Bootstrap, interval


def test_the_interval_resamples_conversations_not_tokens():
    # 20 conversations of 50 identical tokens: the mean is as uncertain as 20 numbers, not as 1,000.
    values = np.repeat(np.random.default_rng(0).normal(size=20), 50)
    conversation = np.repeat(np.arange(20), 50)
    found = Bootstrap(range(20)).mean(values, conversation)
    assert found.value == pytest.approx(values.mean())
    width = 2 * 1.96 * values.std() / np.sqrt(20)
    assert found.low < found.value < found.high and found.high - found.low == pytest.approx(width, rel=0.2)


def test_intervals_are_repeatable_and_paired():
    values, conversation = np.arange(30.0), np.repeat(np.arange(6), 5)
    first, second = Bootstrap(range(6)), Bootstrap(range(6))
    assert first.mean(values, conversation) == second.mean(values, conversation)
    ratio = interval(first.means(2 * values, conversation) / first.means(values, conversation))
    assert ratio == pytest.approx((2, 2, 2))


def test_one_conversation_has_an_interval_of_no_width():
    found = Bootstrap([4]).mean(np.array([1.0, 3.0]), np.array([4, 4]))
    assert found == (2.0, 2.0, 2.0)
