"""Target and score networks (Nectar, arXiv 2605.09778, the MLP variant): o(q) and L(q), one network each.

A network has 1 to 3 hidden layers of silu units (the later ones residual) and a linear path from input to output:

    h_1 = silu(W_in q + b_in),    h_{i+1} = silu(W_i h_i + b_i) + h_i,    y = W_outᵀ h + W_skip q + b_out
"""

import mlx.core as mx

from ..core.attention import Partial
from ..core.exp import sigmoid
from ..errors import NectarError
from .base import Bank, HeadArrays, Size
from .work import DecodeWork, Layer, Network, WorkItem, WorkKind

MOST_LAYERS = 8


def silu(x: mx.array) -> mx.array:
    return x * sigmoid(x)


class TargetScore(Bank):
    """Two networks a head, `target.*` R^D -> R^D and `score.*` R^D -> R; rows of w_in, w_i and w_out are hidden units.

    size = (target units, target layers, score units, score layers); the layers are the same for all heads of a bank.
    """

    kind = "mlp"

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        queries = queries.astype(mx.float32)
        return Partial(network(parameters, "target", queries), network(parameters, "score", queries)[..., 0])

    def decode_work(self) -> DecodeWork:
        """One hidden layer is the kernel's work; of several, stock matmuls evaluate all but the output layer."""
        skip = WorkItem(WorkKind.LINEAR, matrices=(("target.skip", "score.skip"),), scalars=(0,))
        constants = ("target.b_out", "score.b_out")
        if max(self.sizes[0][1::2]) == 1:
            target = WorkItem(WorkKind.PLAIN, matrices=("target.w_in", "target.w_out"), scalars=("target.b_in",))
            score = WorkItem(WorkKind.SCORE, matrices=("score.w_in",), scalars=("score.b_in", "score.w_out"))
            return DecodeWork((skip, target, score), constants)
        networks = (_hidden_layers(self.parameters, "target"), _hidden_layers(self.parameters, "score"))
        target_units = networks[0][-1].bias.shape[1]
        target = WorkItem(WorkKind.GIVEN, matrices=("target.w_out",), scalars=(0,))
        score = WorkItem(WorkKind.GIVEN_SCORE, matrices=(), scalars=(target_units, "score.w_out"))
        return DecodeWork((skip, target, score), constants, networks)

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        target_units, target_layers, score_units, score_layers = size
        target = _shapes("target", target_units, target_layers, head_dim, head_dim)
        return target | _shapes("score", score_units, score_layers, head_dim, 1)

    @classmethod
    def size_for(cls, units: int) -> Size:
        """Hidden units come in multiples that fill the groups of the quantized form."""
        return (_round_up(units, 8), 2, _round_up(max(1, units // 4), 32), 2)

    @classmethod
    def size_with(cls, *, nodes: int, units: int, layers: int) -> Size:
        return (units, layers, units + 3, layers)

    @classmethod
    def size_of(cls, head: HeadArrays) -> Size:
        size: Size = ()
        for part in ("target", "score"):
            layers = next(n for n in range(1, 99) if f"{part}.w_{n}" not in head)
            size += (head[f"{part}.b_in"].shape[0], layers)
        return size

    @property
    def head_dim(self) -> int:
        return self.parameters["target.w_in"].shape[-1]


def _round_up(units: int, multiple: int) -> int:
    return -(-units // multiple) * multiple


def network(parameters: HeadArrays, name: str, queries: mx.array) -> mx.array:
    """M networks side by side: queries [M, N, D] -> [M, N, E]."""
    p = {n.removeprefix(f"{name}."): a for n, a in parameters.items() if n.startswith(f"{name}.")}
    hidden = silu(queries @ p["w_in"].swapaxes(1, 2) + p["b_in"][:, None])
    layer = 1
    while f"w_{layer}" in p:
        hidden = hidden + silu(hidden @ p[f"w_{layer}"].swapaxes(1, 2) + p[f"b_{layer}"][:, None])
        layer += 1
    return hidden @ p["w_out"] + queries @ p["skip"].swapaxes(1, 2) + p["b_out"][:, None]


def _hidden_layers(parameters: HeadArrays, name: str) -> Network:
    count = sum(n.startswith(f"{name}.b_") for n in parameters) - 1  # all but b_out
    names = ["in", *range(1, count)]
    return tuple(Layer(parameters[f"{name}.w_{n}"], parameters[f"{name}.b_{n}"]) for n in names)


def _shapes(name: str, units: int, layers: int, head_dim: int, outputs: int) -> dict[str, tuple[int, ...]]:
    if not 1 <= layers <= MOST_LAYERS:
        raise NectarError(f"a network of {layers} hidden layers is none")
    shapes: dict[str, tuple[int, ...]] = {"w_in": (units, head_dim), "b_in": (units,)}
    for layer in range(1, layers):
        shapes |= {f"w_{layer}": (units, units), f"b_{layer}": (units,)}
    shapes |= {"w_out": (units, outputs), "skip": (outputs, head_dim), "b_out": (outputs,)}
    return {f"{name}.{n}": s for n, s in shapes.items()}
