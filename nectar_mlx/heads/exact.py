"""Exact: the context's own keys and values, so that every other kind can be checked against the whole path."""

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple, Self

import mlx.core as mx

from ..core.attention import Partial, exact
from .base import Bank, HeadArrays, Size


class HalfKeys(NamedTuple):
    """Keys and values [K, n, D] in half precision, n a multiple of 8; known [1]: how many are not padding."""

    keys: mx.array
    values: mx.array
    known: mx.array


class Exact(Bank):
    """keys and values [n, D] a head: the context's, positions applied, the keys relative to the offset; size = (n,),
    the same for all heads."""

    kind = "exact"
    default_bits = 16
    fitted = trainable = False
    keeps_keys = True
    half: HalfKeys | None = None  # kept where half precision tells scores apart

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        return exact(queries, parameters["keys"], parameters["values"], scale=self.scale)

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        (tokens,) = size
        return {"keys": (tokens, head_dim), "values": (tokens, head_dim)}

    @classmethod
    def size_of(cls, head: HeadArrays) -> Size:
        return (head["keys"].shape[0],)

    @property
    def head_dim(self) -> int:
        return self.parameters["keys"].shape[-1]

    @cached_property
    def largest_value(self) -> float:
        """The largest size of a number in the values."""
        return float(mx.abs(self.parameters["values"]).max().astype(mx.float32).item())  # type: ignore[arg-type]

    def halve(self) -> None:
        """Keeps the keys and values in half precision, until `forget_half`. Those in bfloat16 are no longer kept beside
        them: float16 holds such numbers, so a long text takes its memory once."""
        n = self.parameters["keys"].shape[1]
        padded = {
            name: mx.pad(x.astype(mx.float16), [(0, 0), (0, -n % 8), (0, 0)]) for name, x in self.parameters.items()
        }
        mx.eval(padded)
        self.half = HalfKeys(padded["keys"], padded["values"], mx.array([n], mx.int32) + 0)
        if all(x.dtype == mx.bfloat16 for x in self.parameters.values()):
            self.parameters = {name: x[:, :n] for name, x in padded.items()}

    def forget_half(self) -> None:
        self.half = None

    def part(self, chosen: slice) -> Self:
        """Some of the keys, in all heads the same."""
        if chosen == slice(0, None):
            return self
        parameters = {name: x[:, chosen] for name, x in self.parameters.items()}
        sizes = ((parameters["keys"].shape[1],),) * len(self.sizes)
        part = replace(self, parameters=parameters, sizes=sizes)
        if self.half is not None:
            part.halve()
        return part

    def nodes(self) -> list[HeadArrays]:
        """Every head's keys and values as nodes that stand for themselves."""
        return Weighed.of(self, mx.zeros(self.parameters["keys"].shape[:2])).unstack()


class Weighed(Exact):
    """Exact keys that do not all count alike: bias [n] a head is added to their scores. Never stored."""

    @classmethod
    def of(cls, bank: Exact, bias: mx.array) -> Self:
        """The bank's keys and values with a bias [M, n]."""
        parameters = bank.parameters | {"bias": bias}
        return cls(parameters=parameters, sizes=bank.sizes, scale=bank.scale, offset=bank.offset)

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        p = parameters
        return exact(queries, p["keys"], p["values"], bias=p["bias"], scale=self.scale)

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        return super().shapes(size, head_dim) | {"bias": size}
