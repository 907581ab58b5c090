"""Fitting target and score networks: random hidden layers, a small way out."""

from collections.abc import Sequence

import mlx.core as mx

from ...heads import HeadArrays, Size, TargetScore
from ..samples.sample_store import Samples
from ..solve.initial import Init, Standardization, ToBank
from .base import KindFit


class TargetScoreFit(KindFit):
    """Of `heads.TargetScore`."""

    def initialize(self, heads: Sequence[int], sizes: Sequence[Size], samples: Samples) -> Init:
        return random_networks(sizes, samples, scale=self.run.geometry.scale, seed=self.run.config.seed)


def random_networks(sizes: Sequence[Size], samples: Samples, *, scale: float, seed: int) -> Init:
    """Networks of these sizes to train on samples, by which inputs and outputs are standardised."""
    keys, D = mx.random.split(mx.random.key(seed), len(sizes)), samples.queries.shape[-1]
    bank = TargetScore.stack([_networks(size, D, key) for size, key in zip(sizes, keys, strict=True)], scale=scale)
    to_bank = _to_bank(Standardization.of(samples))
    # The score's way out is a vector, which Muon does not train.
    matrices = (name for name in bank.parameters if name.split(".")[-1].startswith("w_") and name != "score.w_out")
    return Init(bank=bank, parameters=dict(bank.parameters), to_bank=to_bank, muon=frozenset(matrices))


def _networks(size: Size, D: int, key: mx.array) -> HeadArrays:
    """Random hidden layers, a small way out, no linear path."""
    head: HeadArrays = {}
    for name, shape in TargetScore.shapes(size, D).items():
        key, now = mx.random.split(key)
        array = name.split(".")[1]
        if not array.startswith("w_"):
            head[name] = mx.zeros(shape)
            continue
        fan_in = shape[0] if array == "w_out" else shape[-1]
        gain = {"w_in": 1.0, "w_out": 0.14}.get(array, 2**0.5)
        head[name] = mx.random.normal(shape, key=now) * gain * fan_in**-0.5
    return head


def _to_bank(units: Standardization) -> ToBank:
    means = {"target": units.output_mean, "score": units.log_mean}
    stds = {"target": units.output_std, "score": units.log_std}

    def to_bank(p: HeadArrays) -> HeadArrays:
        parameters = dict(p)
        for network in ("target", "score"):
            w_in, skip, std = p[f"{network}.w_in"], p[f"{network}.skip"], stds[network]
            parameters[f"{network}.w_in"] = units.into(w_in)
            parameters[f"{network}.b_in"] = p[f"{network}.b_in"] - units.shift(w_in)
            parameters[f"{network}.w_out"] = p[f"{network}.w_out"] * std[..., None]
            parameters[f"{network}.skip"] = units.into(skip) * std[..., None]
            parameters[f"{network}.b_out"] = means[network] + std * (p[f"{network}.b_out"] - units.shift(skip))
        return parameters

    return to_bank
