"""Where the regression of a head starts."""

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from ...heads import Bank, HeadArrays
from ..samples.sample_store import Samples

ToBank = Callable[[HeadArrays], HeadArrays]
_UNIT_SAMPLES = 2048


@dataclass(frozen=True, kw_only=True)
class Init:
    """A bank to train.

    parameters: as the optimiser sees them; to_bank maps them to the bank's own, as part of the differentiated
    function. muon: the names of those that Muon trains. units: of the optimiser's steps (`optimizers.update`).
    """

    bank: Bank
    parameters: HeadArrays
    to_bank: ToBank
    muon: frozenset[str] = frozenset()
    units: HeadArrays = field(default_factory=dict)

    @classmethod
    def of(cls, bank: Bank) -> "Init":
        """A bank's own parameters, trained as they are."""
        return cls(bank=bank, parameters=dict(bank.parameters), to_bank=lambda parameters: parameters)

    @classmethod
    def of_nodes(cls, bank: Bank, samples: Samples) -> "Init":
        """The nodes of a bank, in better coordinates.

        With q̄ the mean query, a node's score scale · q·k + b is trained as scale · (q - q̄)·k + b': what all queries
        have in common then does not couple k and b, and what rounding does to it in k, b makes up for.
        """
        few = samples.some(slice(_UNIT_SAMPLES))
        queries, output = few.queries.astype(mx.float32), few.output.astype(mx.float32)
        mean = queries.mean(1)[..., None]

        def common(parameters: HeadArrays) -> mx.array:
            scores: mx.array = bank.scale * (parameters["keys"] @ mean)
            return scores[..., 0]

        # A model's and a layer's queries and values differ by orders of magnitude from those of others. The units are
        # what moves a score by a certain amount, and the rms of the output; both are 1 in the median head of
        # SmolLM2-135M, on which the rate was chosen.
        deviation = mx.sqrt(mx.square(queries - mean.swapaxes(1, 2)).sum(-1).mean(1)) + 1e-12
        rms_output = mx.sqrt(mx.square(output).mean((1, 2))) + 1e-12
        units = {"keys": 1.2 / (bank.scale * deviation), "values": 5.0 * rms_output}
        return cls(
            bank=bank,
            parameters=bank.parameters | {"bias": bank.parameters["bias"] + common(bank.parameters)},
            to_bank=lambda parameters: parameters | {"bias": parameters["bias"] - common(parameters)},
            units={name: unit[:, None, None] for name, unit in units.items()},
        )


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
        """Rows of weights [M, H, D] on standardised queries -> on plain ones."""
        return weights / self.query_std

    def shift(self, weights: mx.array) -> mx.array:
        """What the mean query contributes to each row: [M, H]."""
        return (weights @ (self.query_mean / self.query_std).swapaxes(1, 2))[..., 0]
