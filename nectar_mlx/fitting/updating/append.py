"""More text behind a file's: it is read behind the heads and gets nodes of its own beside theirs, which stay as they
are (o and L of the two merge exactly). The old text is neither read nor fitted again, so the cost follows what is new.

A file pays for that with bytes: its new tokens get more nodes than a fit would give them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ...core.clock import Clock
from ...core.device import device
from ...core.progress import Stage
from ...heads import HeadArrays, Size
from ..kinds.quadrature import QuadratureFit
from ..run import FitRun
from ..samples.conversation import Conversation
from ..train import train_heads
from ..work import Machine, Shape
from . import base
from .base import FileContents, Updated, collected, errors_of
from .behind import read_behind
from .revision import Revision

_GROWTH = 3.3  # times as many nodes a new token as a fit gives, at most
_EVEN = 0.6  # power of a head's nodes that its new ones follow: a few more matter most where there are few


class Effort(NamedTuple):
    """What an append takes of a fit. kept: samples of conversations that were kept. new: samples of new conversations,
    for the share of the text that is new. steps: of the regression."""

    kept: float
    new: float
    steps: float


APPEND = Effort(kept=0.08, new=1.6, steps=0.3)
APPEND_MANY = Effort(kept=0.3, new=2.0, steps=2.0)  # where all heads are trained on many samples


class AppendFit(QuadratureFit):
    """Of the new tokens' keys alone, which have a small share of most outputs and a large one of some."""

    by_share = True

    def steps(self, sizes: Sequence[Size]) -> int:
        return math.ceil(effort().steps * super().steps(sizes))


def append(
    run: FitRun, file: FileContents, revision: Revision, study: Sequence[Conversation], *, clock: Clock
) -> Updated:
    """The file's heads with nodes for the new tokens beside their own. study: the conversations that were kept."""
    context = read_behind(run, file, revision.new)
    clock.lap("read")
    kept, new = wanted_samples(run, revision, study)
    data, checking = collected(run, context, revision, study, kept=kept, new=new)
    clock.lap("study")
    kind = AppendFit(run, data)
    heads = train_heads(kind, new_sizes(file, tokens=revision.appended), bits=file.bits)
    clock.lap("regression")
    added = errors_of(kind, heads, whole=context.banks)
    return Updated(
        kind=kind,
        new=checking,
        heads=[_joined(old, own) for old, own in zip(file.heads, heads, strict=True)],
        errors=[a + b for a, b in zip(file.errors or [0.0] * run.n_heads, added, strict=True)],
        report={"samples": data.train.count},
        before=file.metadata["report"],
    )


def expected_stages(
    run: FitRun,
    file: FileContents,
    revision: Revision,
    study: Sequence[Conversation],
    *,
    shape: Shape,
    machine: Machine,
) -> list[Stage]:
    """What an append is expected to take. shape: of the model."""
    kept, new = wanted_samples(run, revision, study)
    seen, steps = revision.appended + sum(m for (m,) in file.sizes) // run.n_heads, effort().steps
    return base.expected_stages(run, study, tokens=seen, kept=kept, new=new, steps=steps, shape=shape, machine=machine)


def wanted_samples(run: FitRun, revision: Revision, study: Sequence[Conversation]) -> tuple[int, int]:
    """How many samples a head are wanted of conversations that were kept, and of new ones."""
    usual = run.n_samples(run.n_heads)
    kept, new = math.ceil(effort().kept * usual), math.ceil(min(1.0, effort().new * revision.share) * usual)
    return (kept, new) if study else (0, new + kept)


def effort() -> Effort:
    """What an append takes of a fit on this device."""
    return APPEND_MANY if device().trained_share == 1 else APPEND


def grown(file: FileContents, *, tokens: int) -> float:
    """How many times as many nodes as a fit would give it the file has with so many tokens more."""
    old, added = sum(m for (m,) in file.sizes), sum(m for (m,) in new_sizes(file, tokens=tokens))
    return (old + added) / (file.nodes_a_token * (len(file.prefix) + tokens))


def new_sizes(file: FileContents, *, tokens: int) -> list[Size]:
    """Of every head the nodes for so many new tokens. Of many tokens each gets fewer, until a text that is twice as
    long takes twice as many nodes, as a fit's does."""
    old, powers = len(file.prefix), np.array([max(1, m) ** _EVEN for (m,) in file.sizes])
    left = file.nodes_a_token * max(tokens, min(_GROWTH * tokens, math.sqrt(tokens * old)))
    sizes, order = [1] * len(powers), np.argsort(-powers, kind="stable")
    rest = np.cumsum(powers[order][::-1])[::-1]
    # The largest first: what they cannot use, for they have every key, goes to the others.
    for i, of_rest in zip(order.tolist(), powers[order] / rest, strict=True):
        sizes[i] = max(1, min(tokens, round(left * of_rest)))
        left -= sizes[i]
    return [(m,) for m in sizes]


def _joined(old: HeadArrays, own: HeadArrays) -> HeadArrays:
    """The nodes of both: they stand for different tokens."""
    return {name: mx.concatenate([old[name], own[name].astype(old[name].dtype)]) for name in old}
