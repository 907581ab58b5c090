"""What each layer of a model keeps of a text, and the shapes of its attention."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from ..core.types import JsonObject

FULL, LATENT, WINDOW, SHARED, STATE = "full", "latent", "window", "shared", "state"
"""Kinds of layers: full attention; full attention over latent vectors, of which a token has one for all heads; a
sliding window; attention over the keys and values of an earlier layer; a recurrent state and no attention."""

_SUMMARY = ("n_heads", "n_kv_heads", "head_dim", "scale")  # of the layers with full attention
KINDS = (FULL, LATENT, WINDOW, SHARED, STATE)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer that keeps something of a text: one entry of the model's caches, or a layer that shares one.

    n_heads: of queries. head_dim: of queries and keys. value_dim: of values, at most head_dim. window: the positions
    that a sliding window reaches. source: the layer whose keys and values a shared one reads. states: the shape of
    every array of a recurrent state, for one sequence; a layer with attention may have one, too.
    """

    kind: str
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    scale: float = 1.0
    window: int = 0
    source: int = -1
    states: tuple[tuple[int, ...], ...] = ()

    @property
    def fitted(self) -> bool:
        """Whether heads stand for what it keeps."""
        return self.kind in (FULL, LATENT)

    @property
    def heads(self) -> tuple[int, int, int, int, float]:
        """What all fitted layers of a model have in common."""
        return self.n_heads, self.n_kv_heads, self.head_dim, self.value_dim, self.scale

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of its keys and values of so many tokens in bf16; of a latent layer the latent vectors'."""
        if self.kind in (SHARED, STATE):
            return 0
        per_token = self.n_kv_heads * (self.head_dim + (0 if self.kind == LATENT else self.value_dim))
        return 2 * per_token * (min(tokens, self.window) if self.window else tokens)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A model's layers. Those with full attention, which get heads, all have the shapes `n_heads` to `scale`."""

    model_type: str
    layers: tuple[Layer, ...]

    @classmethod
    def uniform(
        cls, *, model_type: str, n_heads: int, n_kv_heads: int, head_dim: int, scale: float, windows: Sequence[int]
    ) -> Self:
        """Layers that differ in their windows alone; windows[i] is layer i's, 0 for full attention."""
        layers = tuple(
            Layer(
                kind=WINDOW if window else FULL,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                head_dim=head_dim,
                value_dim=head_dim,
                scale=scale,
                window=window,
            )
            for window in windows
        )
        return cls(model_type=model_type, layers=layers)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """From `to_dict`, also after JSON; or from a file of before there were layers of several kinds. TypeError or
        ValueError where its numbers are none, or do not fit each other."""
        if "shapes" not in fields:
            names = ("model_type", "n_heads", "n_kv_heads", "head_dim", "scale", "windows")
            geometry = cls.uniform(**{name: fields[name] for name in names})
        else:
            shapes = [
                Layer(**shape | {"states": tuple(tuple(state) for state in shape["states"])})
                for shape in fields["shapes"]
            ]
            geometry = cls(model_type=fields["model_type"], layers=tuple(shapes[i] for i in fields["layers"]))
        geometry.check()
        if any(fields[name] != getattr(geometry, name) for name in _SUMMARY):
            raise ValueError("its geometry is not that of its layers")
        return geometry

    def to_dict(self) -> JsonObject:
        """For JSON: every distinct layer once in `shapes`, and which of them each layer is."""
        shapes = list(dict.fromkeys(self.layers))
        return {
            "model_type": self.model_type,
            "n_layers": self.n_layers,
            **{name: getattr(self, name) for name in _SUMMARY},
            "shapes": [asdict(shape) for shape in shapes],
            "layers": [shapes.index(layer) for layer in self.layers],
        }

    def check(self) -> None:
        """TypeError where a number is none, ValueError where layers do not fit each other."""
        for number, layer in enumerate(self.layers):
            counts = [layer.n_heads, layer.n_kv_heads, layer.head_dim, layer.value_dim, layer.window, layer.source]
            counts += [size for state in layer.states for size in state]
            if not all(type(count) is int for count in counts) or not isinstance(layer.scale, int | float):
                raise TypeError("its geometry is not numbers")
            if layer.kind not in KINDS or layer.value_dim > layer.head_dim or min(counts[:-1], default=0) < -1:
                raise ValueError(f"its layer {number} is none that there can be")
            if layer.kind == SHARED and not 0 <= layer.source < number:
                raise ValueError(f"its layer {number} shares what no layer has")
        if len({layer.heads for layer in self.layers if layer.fitted}) != 1:
            raise ValueError("its layers with full attention have no shape in common")

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def fitted(self) -> tuple[int, ...]:
        """The layers with full attention, which get heads; the others keep exactly what they need."""
        return tuple(number for number, layer in enumerate(self.layers) if layer.fitted)

    @property
    def windows(self) -> tuple[int, ...]:
        """Each layer's sliding window, 0 where it has none."""
        return tuple(layer.window for layer in self.layers)

    @property
    def _first(self) -> Layer:
        return self.layers[self.fitted[0]]

    @property
    def n_heads(self) -> int:
        return self._first.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self._first.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self._first.head_dim

    @property
    def value_dim(self) -> int:
        return self._first.value_dim

    @property
    def scale(self) -> float:
        return self._first.scale

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the bf16 KV cache of this many tokens; recurrent states are not counted."""
        return sum(layer.cache_bytes(tokens) for layer in self.layers)

    def window_bytes(self, tokens: int) -> int:
        """Bytes that sliding-window layers keep of a text of so many tokens, in bf16."""
        return sum(layer.cache_bytes(tokens) for layer in self.layers if layer.window)
