"""Where the regression of a head starts."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ...heads import Bank, HeadArrays
from ..samples.sample_store import Samples

ToBank = Callable[[HeadArrays], HeadArrays]


@dataclass(frozen=True, kw_only=True)
class Init:
    """A bank to train.

    parameters: as the optimiser sees them; to_bank maps them to the bank's own, as part of the differentiated
    function. muon: the names of those that Muon trains.
    """

    bank: Bank
    parameters: HeadArrays
    to_bank: ToBank
    muon: frozenset[str] = frozenset()

    @classmethod
    def of(cls, bank: Bank) -> "Init":
        """A bank's own parameters, trained as they are."""
        return cls(bank=bank, parameters=dict(bank.parameters), to_bank=lambda parameters: parameters)


@dataclass(frozen=True)
class Standardization:
    """The coordinates that networks of M heads are trained in: x = (q - mean) / std in, y = mean + std · ŷ out.

    Queries' mean and std [M, 1, D], output's mean [M, D] and std [M, 1], L's mean and std [M, 1].
    """

    query_mean: mx.array
    query_std: mx.array
    output_mean: mx.array
    output_std: mx.array
    log_mean: mx.array
    log_std: mx.array

    @classmethod
    def of(cls, samples: Samples) -> "Standardization":
        queries, output = samples.queries.astype(mx.float32), samples.output.astype(mx.float32)
        log = samples.log_normalizer.astype(mx.float32)
        return cls(
            queries.mean(1, keepdims=True),
            mx.sqrt(queries.var(1, keepdims=True)) + 1e-4,
            output.mean(1),
            mx.sqrt(output.var(1).mean(-1, keepdims=True)) + 1e-6,
            log.mean(1, keepdims=True),
            mx.sqrt(log.var(1, keepdims=True)) + 1e-4,
        )

    def into(self, weights: mx.array) -> mx.array:
        """Rows of weights [M, H, D] on standardized queries -> on plain ones."""
        return weights / self.query_std

    def shift(self, weights: mx.array) -> mx.array:
        """What the mean query contributes to each row: [M, H]."""
        return (weights @ (self.query_mean / self.query_std).swapaxes(1, 2))[..., 0]
