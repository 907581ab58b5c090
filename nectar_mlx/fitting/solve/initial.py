"""Where the regression starts, kind by kind: sizes that a number of bytes buys, first parameters, and how they are
trained.

Nodes start from Attention Matching. Networks are trained in standardised coordinates, x = (q - mean) / std in and y =
mean + std · ŷ out, and folded into the plain form that heads/ evaluates; folding is part of the differentiated
function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ... import store
from ...heads import Bank, Corrected, HeadArrays, Quadrature, Size, TargetScore
from ...store import Layout
from ..samples.sample_store import Samples

ToBank = Callable[[HeadArrays], HeadArrays]
_UNIT_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Init:
    """A bank to train: `parameters` as the optimiser sees them, `fold` maps them to the bank's own. `units` are those
    of the optimiser's steps (`optimizers.update`)."""

    bank: Bank
    parameters: HeadArrays
    fold: ToBank
    muon: frozenset[str] = frozenset()
    units: HeadArrays = field(default_factory=dict)

    @classmethod
    def of(cls, bank: Bank, rows: Samples | None = None) -> "Init":
        """That of a bank as it is. rows: by which its nodes are put into better coordinates, where it has nodes.

        With q̄ the mean query, a node's score scale · q·k + b is trained as scale · (q - q̄)·k + b': what all queries
        have in common then does not couple k and b, and what rounding does to it in k, b makes up for.
        """
        parameters = dict(bank.parameters)
        if rows is None:
            return cls(bank=bank, parameters=parameters, fold=lambda parameters: parameters)
        queries, output = (x[:, :_UNIT_ROWS].astype(mx.float32) for x in (rows.queries, rows.output))
        mean = queries.mean(1)[..., None]

        def common(parameters: HeadArrays) -> mx.array:
            scores: mx.array = bank.scale * (parameters["keys"] @ mean)
            return scores[..., 0]

        # A model's and a layer's queries and values differ by orders of magnitude from those of others. The units are
        # what moves a score by a certain amount, and the rms of the output; both are 1 in the median head of
        # SmolLM2-135M, on which the rate was chosen.
        spread = mx.sqrt(mx.square(queries - mean.swapaxes(1, 2)).sum(-1).mean(1)) + 1e-12
        size = mx.sqrt(mx.square(output).mean((1, 2))) + 1e-12
        units = {"keys": 1.2 / (bank.scale * spread), "values": 5.0 * size}
        return cls(
            bank=bank,
            parameters=parameters | {"bias": parameters["bias"] + common(parameters)},
            fold=lambda parameters: parameters | {"bias": parameters["bias"] - common(parameters)},
            units={name: unit[:, None, None] for name, unit in units.items()},
        )


def size_for(layout: Layout, nbytes: float, *, most: int) -> Size:
    """The largest head of the kind that these bytes buy, the smallest one if they buy none. most: of nodes or hidden
    units.
    """
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if store.head_bytes(layout, layout.bank.size_for(middle)) <= nbytes:
            low = middle
        else:
            high = middle - 1
    return layout.bank.size_for(low)


def smallest_bytes(layout: Layout) -> float:
    """Bytes of the smallest head worth fitting: four nodes, or the smallest network."""
    return store.head_bytes(layout, layout.bank.size_for(4))


def start(layout: Layout, nodes: Sequence[HeadArrays], sizes: Sequence[Size], rows: Samples, *, seed: int) -> Init:
    """What to train for M heads of the layout's kind.

    nodes: Attention Matching's heads where the kind has nodes; rows: captured rows of the heads, for the
    standardisation.
    """
    if layout.kind == "quadrature":
        return Init.of(Quadrature.stack(nodes, scale=layout.scale), rows)
    key = mx.random.key(seed)
    if layout.kind == "corrected":
        heads = [node | _correction(size, layout, k) for node, size, k in _each(nodes, sizes, key)]
        kind: type[Bank] = Corrected
    else:
        heads = [_networks(size, layout, k) for _, size, k in _each(sizes, sizes, key)]
        kind = TargetScore
    bank = kind.stack(heads, scale=layout.scale)
    units = _Units.of(rows)
    matrices = frozenset(n for n in bank.parameters if n.split(".")[-1].startswith("w_") and n not in _VECTORS)
    fold = _fold_correction(units) if layout.kind == "corrected" else _fold_networks(units)
    return Init(bank=bank, parameters=dict(bank.parameters), fold=fold, muon=matrices)


_VECTORS = frozenset({"w_score", "score.w_out"})


def _each(nodes: Sequence[object], sizes: Sequence[Size], key: mx.array) -> zip:  # type: ignore[type-arg]
    return zip(nodes, sizes, mx.random.split(key, len(sizes)), strict=True)


@dataclass(frozen=True)
class _Units:
    """Standardisation of M heads: queries' mean and std [M, 1, D], output's mean [M, D] and std [M, 1], L's mean and
    std [M, 1].
    """

    query_mean: mx.array
    query_std: mx.array
    output_mean: mx.array
    output_std: mx.array
    log_mean: mx.array
    log_std: mx.array

    @classmethod
    def of(cls, rows: Samples) -> "_Units":
        queries, output, log = (x.astype(mx.float32) for x in (rows.queries, rows.output, rows.log_normalizer))
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


def _correction(size: Size, layout: Layout, key: mx.array) -> HeadArrays:
    """A gated layer that corrects nothing yet: its way out is zero."""
    _, units = size
    D = layout.head_dim
    gate, up = (mx.random.normal((units, D), key=k) * D**-0.5 for k in mx.random.split(key))
    hidden = {"w_gate": gate, "b_gate": mx.zeros(units), "w_up": up, "b_up": mx.zeros(units)}
    out = {"w_out": mx.zeros((units, D)), "w_score": mx.zeros(units), "b_out": mx.zeros(D), "b_score": mx.zeros(1)}
    return hidden | out


def _fold_correction(units: _Units) -> ToBank:
    def fold(p: HeadArrays) -> HeadArrays:
        return p | {
            "w_gate": units.into(p["w_gate"]),
            "b_gate": p["b_gate"] - units.shift(p["w_gate"]),
            "w_up": units.into(p["w_up"]),
            "b_up": p["b_up"] - units.shift(p["w_up"]),
            "w_out": p["w_out"] * units.output_std[..., None],
            "b_out": p["b_out"] * units.output_std,
            "w_score": p["w_score"] * units.log_std,
            "b_score": p["b_score"] * units.log_std,
        }

    return fold


def _networks(size: Size, layout: Layout, key: mx.array) -> HeadArrays:
    """Random hidden layers, a small way out, no linear path."""
    head: HeadArrays = {}
    for name, shape in TargetScore.shapes(size, layout.head_dim).items():
        key, now = mx.random.split(key)
        array = name.split(".")[1]
        if not array.startswith("w_"):
            head[name] = mx.zeros(shape)
            continue
        fan_in = shape[0] if array == "w_out" else shape[-1]
        gain = {"w_in": 1.0, "w_out": 0.14}.get(array, 2**0.5)
        head[name] = mx.random.normal(shape, key=now) * gain * fan_in**-0.5
    return head


def _fold_networks(units: _Units) -> ToBank:
    means = {"target": units.output_mean, "score": units.log_mean}
    stds = {"target": units.output_std, "score": units.log_std}

    def fold(p: HeadArrays) -> HeadArrays:
        folded = dict(p)
        for part in ("target", "score"):
            w_in, skip, std = p[f"{part}.w_in"], p[f"{part}.skip"], stds[part]
            folded[f"{part}.w_in"] = units.into(w_in)
            folded[f"{part}.b_in"] = p[f"{part}.b_in"] - units.shift(w_in)
            folded[f"{part}.w_out"] = p[f"{part}.w_out"] * std[..., None]
            folded[f"{part}.skip"] = units.into(skip) * std[..., None]
            folded[f"{part}.b_out"] = means[part] + std * (p[f"{part}.b_out"] - units.shift(skip))
        return folded

    return fold
