"""Several fitted texts in one conversation, fitted apart and put together when a question is asked.

Every file stands for its text behind the chat template's head, its preamble. Side by side, all texts are at the same
positions (parallel context windows, arXiv 2212.10947); end to end, each is moved behind the one before it. Either way C
texts weigh as much as one:

    L = log (1/C) Σ exp(L_c)

so that the preamble, which every file has, counts once. No text knows of the others: what that costs is in
docs/log/composition.md. Where one text can be chosen, answers from it alone are better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import NectarError
from .heads import Bank
from .mlxlm import attention_patch, placement
from .mlxlm.kept import Kept, make_caches, plain_windows
from .mlxlm.positions import shifted
from .mlxlm.window import window
from .nectar import Nectar


@dataclass(frozen=True)
class Composition:
    """What `compose` makes: used as a `Nectar` is, by its `make_cache`.

    Attributes:
        nectars: the files, in their order.
        banks: the heads of each layer with full attention.
        windows: of the layers with a sliding window: the last file's.
        start: the position of the token that follows.
    """

    nectars: Sequence[Nectar]
    banks: Sequence[Bank]
    windows: Mapping[int, Kept]
    start: int

    def make_cache(self, *, kv_bits: int | None = None) -> list[Any]:
        """Fresh caches for mlx-lm; kv_bits as for `Nectar.make_cache`."""
        return make_caches(self.banks, self.windows, self.start, kv_bits=kv_bits)


def compose(
    nectars: Sequence[Nectar], model: nn.Module, *, preamble: int | None = None, end_to_end: bool = True
) -> Composition:
    """Puts files of one model together.

    Args:
        nectars: files made of nodes or exact keys.
        model: the model that they were fitted on.
        preamble: tokens that all prefixes begin with (default: as many as they do).
        end_to_end: each text behind the one before it; else all at the same positions, behind the preamble.

    NectarError for files of different models or of another one, or of networks, where a layer's keys cannot be moved,
    for texts beyond the model's window, and for a preamble that they do not share.
    """
    if not nectars:
        raise NectarError("there is no file to compose")
    if len({nectar.metadata["model_sha256"] for nectar in nectars}) > 1:
        raise NectarError("these files were fitted on different models: compose files of one model")
    if attention_patch.route(model) != nectars[0].geometry:
        raise NectarError("these files were fitted on another model than the one given: load that one")
    last = plain_windows(nectars[-1].geometry, nectars[-1].windows, "put together")
    alike = placement.common_tokens([nectar.prefix for nectar in nectars])
    common = alike if preamble is None else preamble
    if not 0 <= common <= alike:
        raise NectarError(f"a preamble of {common:,} tokens: these files have {alike:,} in common at their beginning")
    lengths = [nectar.start - common for nectar in nectars]
    # All texts end where the question starts, or where the next one begins.
    longest = max(lengths)
    start = common + (sum(lengths) if end_to_end else longest)
    if (positions := window(model)) is not None and start >= positions:
        raise NectarError(
            f"together the texts take {start:,} tokens, and the model's window has {positions:,}: compose fewer files, "
            "or with end_to_end=False"
        )
    shifts = placement.end_to_end(lengths) if end_to_end else [longest - length for length in lengths]
    geometry, less = nectars[0].geometry, math.log(len(nectars))
    banks: list[Bank] = []
    for index, layer in enumerate(geometry.fitted):
        nodes = placement.nodes(model, layer, [nectar.banks[index] for nectar in nectars], shifts)
        nodes["bias"] = nodes["bias"] - less
        banks.append(placement.bank(nodes, scale=geometry.scale, offset=nodes["keys"].mean(1)))
        mx.eval(banks[-1].parameters)
    by = start - nectars[-1].start
    windows = {
        layer: replace(w, keys=shifted(model, layer, w.keys, by).astype(w.keys.dtype)) for layer, w in last.items()
    }
    return Composition(nectars, banks, windows, start)
