"""New tokens behind a file: its heads stand for the old text, and what is new is read, asked about and fitted alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ...core.attention import Partial, merge
from ...heads import Bank, Exact
from ...mlxlm.kept import make_caches, what_is_kept
from ...store import load
from .. import finite
from ..prefill import Context, read_into
from ..run import FitRun
from .base import FileContents


@dataclass(kw_only=True)
class Behind(Exact):
    """Exact keys and values of the tokens that follow others, for which a bank stands; of a `Context` whose preamble is
    these others.

    parameters: of the tokens behind. before: the bank, relative to the same offset. tokens: how many it stands for.
    """

    before: Bank
    tokens: int

    @classmethod
    def of(cls, before: Bank, own: Exact, tokens: int) -> "Behind":
        """own: of the tokens behind."""
        fields: Any = {"parameters": own.parameters, "sizes": own.sizes, "scale": own.scale, "offset": own.offset}
        return cls(**fields, before=before, tokens=tokens)

    def __call__(self, queries: mx.array) -> Partial:
        return merge(self.before(queries), super().__call__(queries))

    @property
    def largest_value(self) -> float:
        """Of both."""
        own, before = self.parameters["values"], self.before.parameters["values"]
        return max(float(mx.abs(x).max().astype(mx.float32).item()) for x in (own, before))  # type: ignore[arg-type]

    def part(self, chosen: slice) -> Any:
        """What is before, or what is behind: nothing in between."""
        if chosen == slice(self.tokens):
            return self.before
        assert chosen == slice(self.tokens, None), "a bank cannot be cut"
        own = Exact(parameters=self.parameters, sizes=self.sizes, scale=self.scale, offset=self.offset)
        if self.half is not None:
            own.half = self.half
        return own


def read_behind(run: FitRun, file: FileContents, prefix: Sequence[int]) -> Context:
    """The tokens of a prefix that follow the file's, read with its heads in the place of the old text."""
    old, new = len(file.prefix), prefix[len(file.prefix) :]
    before = [replace(bank, offset=offset) for bank, offset in zip(file.banks, file.offsets, strict=True)]
    windows = load.as_computed(load.windows(file.tensors, run.geometry, old), run.model)
    caches = make_caches(before, windows, old)
    with run.progress("reading", len(new)) as done:
        read_into(run.model, new, caches, progress=done)
    offsets, banks, behind = iter(file.offsets), iter(before), Context(list(prefix), [], {}, preamble=old)
    for number, (layer, cache) in enumerate(zip(run.geometry.layers, caches, strict=True)):
        own, kept = what_is_kept(cache, layer, offset=next(offsets) if layer.fitted else None)
        if own is not None:
            behind.banks.append(Behind.of(next(banks), own, old))
        if kept is not None:
            behind.windows[number] = kept
    finite.check_banks("reading", behind.banks, run.geometry)
    return behind
