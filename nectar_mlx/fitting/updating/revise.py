"""A file's heads trained on for a text that was changed, from where they are."""

import math
from collections.abc import Sequence
from dataclasses import replace

from ...core.clock import Clock
from ...core.device import device
from ...heads import Size
from ..run import FitRun
from ..samples.conversation import Conversation
from .base import FileContents, Updated, collected, read, retrained
from .revision import Revision
from .warm import Effort, WarmFit, attention_shares, moved_nodes

_CROWD = 1.5  # times their number: the attention that new tokens within a text are taken to get


# Behind a text nearly all nodes are already where they belong; a change within it moves what follows.
APPEND = Effort(kept=0.4, new=1.0, steps=0.3, rate=1 / 2, few=0.6, fresh=False)
EDIT = Effort(kept=0.5, new=1.0, steps=0.3, rate=1 / 2, few=0.6, fresh=True)
EDIT_LARGE = replace(EDIT, steps=0.5, rate=1.0)  # where there are samples enough for large heads to be trained


def revise(
    run: FitRun,
    file: FileContents,
    revision: Revision,
    study: Sequence[Conversation],
    *,
    clock: Clock,
) -> Updated:
    """Heads for the new text. study: the conversations that were kept, of the old one."""
    effort = effort_for(revision)
    context = read(run, file, revision.new)
    clock.lap("read")
    usual, share = run.n_samples(run.n_heads), revision.share
    kept = int(min(1.0, effort.kept + share) * usual)
    new = int(min(1.0, effort.new * share) * usual)
    data = collected(run, context, revision, study, kept=kept, new=new if study else new + kept)
    clock.lap("study")
    places = [place for start, end in revision.changed for place in range(start, end)]
    sizes = new_sizes(file.sizes, revision, tokens=len(places))
    shares = [_CROWD * len(places) / context.length] * run.n_heads
    if revision.appended:  # the end of a text takes more attention than its length tells
        shares = attention_shares(run, data, places)
    rooms = [
        _room(m, s, len(places), more=max(0, m - old))
        for (m,), (old,), s in zip(sizes, file.sizes, shares, strict=True)
    ]
    kind = WarmFit(
        run,
        data,
        nodes=moved_nodes(run, file.banks, context, revision.kept),
        places=places,
        sizes=sizes,
        rooms=rooms,
        effort=effort,
    )
    if not revision.appended and all(part.moved == 0 for part in revision.kept):
        kind.settle(file)
    return retrained(kind, file, sizes, clock=clock)


def effort_for(revision: Revision) -> Effort:
    """What an update takes of a fit on this device."""
    if revision.appended:
        return APPEND
    return EDIT if device().trained_share < 1 else EDIT_LARGE


def _room(nodes: int, share: float, tokens: int, *, more: int) -> int:
    """How many of a head's nodes are for new tokens that take about so much of its attention."""
    return min(tokens, nodes // 2, math.ceil(share * nodes) + more)


def new_sizes(sizes: Sequence[Size], revision: Revision, *, tokens: int) -> list[Size]:
    """Of heads of these sizes, all together in proportion to the text's length. By what that is more every head grows
    alike, for the error of a few nodes falls the fastest, but not by more than there are new tokens; a head that kept
    every key keeps every key."""
    before, length = len(revision.old), len(revision.new)
    others = [m for (m,) in sizes if m < before]
    growth = (length / before - 1) * sum(others)
    more = min(tokens, round(growth / max(1, len(others))))

    def new_size(nodes: int) -> int:
        if nodes >= before:
            return length
        return min(length, nodes + more) if growth > 0 else max(1, round(nodes * length / before))

    return [(new_size(m),) for (m,) in sizes]
