"""Sampling: bounds of every number, and seeds that other requests do not disturb."""

import math

import mlx.core as mx
import pytest

from nectar_mlx.answering import Sampling, SamplingError
from nectar_mlx.answering.sampling import _BOUNDS


@pytest.mark.parametrize("name", _BOUNDS)
@pytest.mark.parametrize("value", [True, math.nan, math.inf, -math.inf, 10**400, -(10**400), "1", [1], 1e308])
def test_a_number_out_of_its_bounds_is_named(name, value):
    with pytest.raises(SamplingError, match=name) as error:
        Sampling(**{name: value})
    assert error.value.name == name


@pytest.mark.parametrize("bias", [{1: math.nan}, {1: True}, {-1: 0.0}, {True: 1.0}, {1: 101.0}, {1: None}])
def test_biases_have_bounds(bias):
    with pytest.raises(SamplingError, match="logit_bias"):
        Sampling(logit_bias=bias)


def test_biases_stay_in_the_vocabulary():
    Sampling(logit_bias={9: 1.0}).check_vocabulary(10)
    with pytest.raises(SamplingError, match="vocabulary"):
        Sampling(logit_bias={10: 1.0}).check_vocabulary(10)


EXTREMES = [
    {},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    {"xtc_probability": 1.0, "xtc_threshold": 0.5},
    {"top_p": 1e-9},
    {"top_p": 0.0},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 2**31 - 1},
    {"temperature": 5},
    {"temperature": 1e-3},
    {"temperature": 5e-324},
]


@pytest.mark.parametrize("options", EXTREMES, ids=str)
@pytest.mark.parametrize("seed", [None, 3, -1])
def test_every_extreme_gives_a_token(options, seed):
    logits = mx.random.normal((1, 50)) * 20
    sampler = Sampling(**{"temperature": 1.0, **options, "seed": seed}).sampler()
    token = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert token.shape == (1,) and 0 <= token.item() < 50


def test_xtc_takes_the_least_likely_above_the_threshold():
    logprobs = mx.log(mx.array([[0.4, 0.35, 0.2, 0.05]]))
    sampler = Sampling(temperature=1e-3, xtc_probability=1.0, xtc_threshold=0.1, seed=0).sampler()
    assert sampler(logprobs).item() == 2


def test_a_seed_is_not_disturbed_by_other_requests():
    logprobs = mx.zeros((1, 1000)) - math.log(1000)

    def draws(*, between: bool) -> list[int]:
        sampler, other = Sampling(temperature=1.0, seed=7).sampler(), Sampling(temperature=1.0).sampler()
        found = []
        for _ in range(8):
            found.append(int(sampler(logprobs).item()))
            if between:
                other(logprobs).item()
        return found

    assert draws(between=False) == draws(between=True)
    assert len(set(draws(between=False))) > 4


def test_penalties_and_biases_change_logits():
    logits = mx.zeros((1, 5))
    for processor in Sampling(presence_penalty=1.0, logit_bias={2: 50.0}).processors():
        logits = processor(mx.array([4]), logits)
    assert logits.tolist() == [[0, 0, 50, 0, -1]]
    assert Sampling().processors() == []
