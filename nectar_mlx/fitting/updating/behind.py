"""New tokens behind a file: its heads stand for the old ones, while heads are fitted to the new ones alone."""

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ...core.attention import Partial, merge
from ...heads import Bank, Exact


@dataclass(kw_only=True)
class Behind(Exact):
    """Exact keys and values of the tokens that follow others, for which a bank stands.

    parameters: of the tokens behind. before: the bank. tokens: how many it stands for. Of a `Context` whose preamble
    is these tokens.
    """

    before: Bank
    tokens: int

    @classmethod
    def of(cls, before: Bank, exact: Exact, tokens: int) -> "Behind":
        """exact: all keys and values, of which the first `tokens` are the bank's."""
        own = exact.part(slice(tokens, None))
        fields: Any = {"parameters": own.parameters, "sizes": own.sizes, "scale": own.scale, "offset": own.offset}
        return cls(**fields, before=before, tokens=tokens)

    def __call__(self, queries: mx.array) -> Partial:
        return merge(self.before(queries), super().__call__(queries))

    @property
    def half(self) -> bool:
        """Never: the keys alone, in half precision, would answer without the bank."""
        return False

    @half.setter
    def half(self, value: bool) -> None:
        pass

    @property
    def largest_value(self) -> float:
        own, before = self.parameters["values"], self.before.parameters["values"]
        return max(float(mx.abs(x).max().astype(mx.float32).item()) for x in (own, before))  # type: ignore[arg-type]

    def part(self, chosen: slice) -> Any:
        """What is before, or what is behind: nothing in between."""
        if chosen == slice(self.tokens):
            return self.before
        assert chosen == slice(self.tokens, None), "a bank cannot be cut"
        return Exact(parameters=self.parameters, sizes=self.sizes, scale=self.scale, offset=self.offset)


def behind(before: Bank, exact: Exact, tokens: int) -> Behind:
    """`Behind.of` with what both are relative to made the same."""
    return Behind.of(replace(before, offset=exact.offset), exact, tokens)
