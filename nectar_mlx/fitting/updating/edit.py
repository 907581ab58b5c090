"""A text that was changed here and there: the file's heads are trained on from where they are, on the conversations
that were kept, whose questions are still good, and on a few about what is new."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...core.clock import Clock
from ...heads import HeadArrays, Quadrature
from ..kinds.quadrature import QuadratureFit
from ..run import FitRun
from ..samples.conversation import Conversation
from ..solve import regression
from .base import FileContents, Updated, collected, read, retrained, shorter
from .revision import Revision
from .warm import WarmFit, moved_nodes

STEPS = 0.5  # of a fit's
_SAMPLES = 0.5  # of a fit's
_NODES = 1.5  # for what is new, in proportion
_SAME = 1.1  # times the error that a head had: it is left as it is


class EditFit(WarmFit):
    """Every head starts from the nodes of a file, or from Attention Matching of the whole text where that errs less on
    held-out samples: a change can move all that follows it."""

    def match(self, heads: Sequence[int], counts: Sequence[int]) -> list[HeadArrays]:
        warm, fresh = super().match(heads, counts), QuadratureFit.match(self, heads, counts)
        held_out, scale = self.held_out_samples(heads), self.run.geometry.scale
        errors = [np.array(regression.errors(Quadrature.stack(x, scale=scale), held_out)) for x in (warm, fresh)]
        return [w if kept else f for w, f, kept in zip(warm, fresh, errors[0] <= errors[1], strict=True)]


def edit(
    run: FitRun, file: FileContents, revision: Revision, study: Sequence[Conversation], *, clock: Clock
) -> Updated:
    """The file's heads, trained on."""
    context = read(run, file, revision.new)
    clock.lap("read")
    samples = int(min(1.0, _SAMPLES + revision.share) * run.n_samples(run.n_heads))
    data = collected(run, context, revision, study, kept=samples, new=int(2 * revision.share * samples))
    clock.lap("study")
    places = [place for start, end in revision.changed for place in range(start, end)]
    sizes = _sizes(file, revision)
    rooms = [min(len(places), math.ceil(_NODES * m * len(places) / context.length), m // 2) for (m,) in sizes]
    nodes = moved_nodes(run, file.banks, context, revision.kept)
    kind = EditFit(shorter(run, data, steps=STEPS), data, nodes=nodes, places=places, rooms=rooms)
    if all(part.moved == 0 for part in revision.kept):
        kind.settled = _untouched(kind, file)
    return retrained(kind, file, sizes, clock=clock)


def _sizes(file: FileContents, revision: Revision) -> list[tuple[int]]:
    """In proportion to the text's length: a head that kept every key keeps every key."""
    n = len(revision.new)
    return [(min(n, max(1, round(size[0] * n / len(revision.old)))),) for size in file.sizes]


def _untouched(kind: EditFit, file: FileContents) -> dict[int, HeadArrays]:
    """The heads that answer the new text as well as they did the old one."""
    K, same = kind.run.geometry.n_kv_heads, dict[int, HeadArrays]()
    if not file.errors:
        return same
    for layer, bank in enumerate(file.banks):
        heads: Any = range(layer * K, layer * K + K)
        errors = np.array(regression.errors(bank, kind.held_out_samples(heads)))
        for index, head, error in zip(heads, bank.unstack(), errors, strict=True):
            if error <= _SAME * file.errors[index]:
                same[index] = head
    return same
