"""More text behind the old one: heads for its keys alone, beside the file's own, which stay as they are."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from ... import store
from ...core.clock import Clock
from ...heads import Exact, HeadArrays, Size
from ...store import load
from ..kinds import kind_fit
from ..run import FitRun
from ..samples.capture import capture
from ..samples.conversation import Conversation
from ..train import merged_errors, train_heads
from .base import FileContents, Updated, converse, read, some
from .behind import behind
from .revision import Revision

LEAST = 4  # nodes of a head for the new text
_SAMPLES = 2.0  # of a fit's, times the new text's share of all of it
_FEWEST, _MOST = 0.15, 1.0  # of a fit's


def append(
    run: FitRun, file: FileContents, revision: Revision, study: Sequence[Conversation], *, clock: Clock
) -> Updated:
    """The old heads, and behind them nodes for the new tokens, in proportion."""
    old, tokens = len(revision.old), revision.appended
    whole = read(run, file, revision.new)
    clock.lap("read")
    banks: list[Exact] = [behind(before, exact, old) for before, exact in zip(file.banks, whole.banks, strict=True)]
    context = replace(whole, banks=banks, preamble=old)
    share = min(_MOST, max(_FEWEST, _SAMPLES * tokens / len(revision.new)))
    samples = max(1, int(share * run.n_samples(run.n_heads)))
    run = replace(run, config=replace(run.config, queries=samples))
    conversations = some(study, run, samples=samples // 2)
    conversations += converse(run, context, revision, study, wanted=samples // 2)
    data = capture(run, context, conversations)
    clock.lap("study")
    kind = kind_fit(run, data)
    fitted = train_heads(kind, [_size(size, tokens, old) for size in file.sizes], bits=file.bits)
    clock.lap("regression")
    new = load.banks(run.layout, store.pack(run.layout, fitted, offsets=whole.offsets))
    errors = [a + b for a, b in zip(file.errors or [0.0] * run.n_heads, merged_errors(kind, new), strict=True)]
    heads = [_joined(a, b) for a, b in zip(file.heads, fitted, strict=True)]
    return Updated(heads=heads, errors=errors, context=whole, data=data, report={"samples": samples})


def _size(size: Size, tokens: int, old: int) -> Size:
    """As many nodes for so many new tokens as a head has for the old ones, in proportion."""
    return (min(tokens, max(LEAST, round(size[0] * tokens / old))),)


def _joined(first: HeadArrays, second: HeadArrays) -> HeadArrays:
    """The nodes of both: their sets are disjoint, so that is exact."""
    return {name: mx.concatenate([first[name], second[name].astype(first[name].dtype)]) for name in first}
