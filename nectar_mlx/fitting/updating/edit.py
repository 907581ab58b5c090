"""A text that was changed: the file's heads are trained on from where they are, on the conversations that it kept (`fit
--keep-study`) and a few new ones, with nodes for the new tokens in the place of those that are used the least.
"""

import math
from collections.abc import Sequence

from ...core.clock import Clock
from ...core.device import device
from ...core.progress import Stage
from ...heads import Size
from ..run import FitRun
from ..samples.conversation import Conversation
from ..work import Machine, Shape
from . import base
from .base import FileContents, Updated, collected, read, retrained
from .revision import Revision
from .warm import Effort, WarmFit, moved_nodes

_LARGE, _WHOLE = 0.4, 0.9  # of the text's keys: what large heads have, and those that keep all of them
_CROWD = 1.5  # times their share of the text: the share of a head's nodes that new tokens get

EDIT = Effort(kept=0.65, new=1.0, steps=0.4, rate=1 / 2, few=0.7)
# Where all heads are trained on many samples, half of these and a quarter of the steps lose next to nothing.
EDIT_MANY = Effort(kept=0.5, new=1.0, steps=0.25, rate=1 / 2, few=0.5)
MORE_MANY = Effort(kept=1.0, new=3.0, steps=1.0, rate=1.0, few=1.0)  # where more text follows


def edit(
    run: FitRun, file: FileContents, revision: Revision, study: Sequence[Conversation], *, clock: Clock
) -> Updated:
    """Heads for the new text. study: the conversations that were kept, of the old one."""
    context = read(run, file, revision.new)
    clock.lap("read")
    kept, new = wanted_samples(run, revision)
    data, checking = collected(run, context, revision, study, kept=kept, new=new)
    clock.lap("study")
    places = [place for start, end in revision.changed for place in range(start, end)]
    sizes, share = new_sizes(file.sizes, revision, tokens=len(places)), _CROWD * len(places) / context.length
    kind = WarmFit(
        run,
        data,
        nodes=moved_nodes(run, file.banks, context, revision.kept),
        places=places,
        sizes=sizes,
        rooms=[
            _room(m, share, len(places), more=max(0, m - old)) for (m,), (old,) in zip(sizes, file.sizes, strict=True)
        ],
        effort=effort(revision),
    )
    if not revision.appended and all(part.moved == 0 for part in revision.kept):
        kind.settle(file)
    return retrained(kind, file, sizes, new=checking, clock=clock)


def expected_stages(
    run: FitRun, revision: Revision, study: Sequence[Conversation], *, shape: Shape, machine: Machine
) -> list[Stage]:
    """What an edit is expected to take. shape: of the model."""
    kept, new = wanted_samples(run, revision)
    tokens, steps = len(revision.new), effort(revision).steps
    return base.expected_stages(
        run, study, tokens=tokens, kept=kept, new=new, steps=steps, shape=shape, machine=machine
    )


def wanted_samples(run: FitRun, revision: Revision) -> tuple[int, int]:
    """How many samples a head are wanted of conversations that were kept, and of new ones."""
    usual, share, taken = run.n_samples(run.n_heads), revision.share, effort(revision)
    return int(min(1.0, taken.kept + share) * usual), int(min(1.0, taken.new * share) * usual)


def effort(revision: Revision) -> Effort:
    """What it takes of a fit on this device."""
    if device().trained_share < 1:
        return EDIT
    return MORE_MANY if revision.appended else EDIT_MANY


def _room(nodes: int, share: float, tokens: int, *, more: int) -> int:
    """How many of a head's nodes are for new tokens that get such a share of them."""
    return min(tokens, nodes // 2, math.ceil(share * nodes) + more)


def new_sizes(sizes: Sequence[Size], revision: Revision, *, tokens: int) -> list[Size]:
    """Of heads of these sizes, in proportion to the text's length. A large head looks for single tokens: it grows as
    the text does, and one that kept nearly every key keeps every key. What the others grow by is divided equally, for
    the error of a few nodes falls the fastest, but none by more than there are new tokens."""
    before, length = len(revision.old), len(revision.new)
    others = [m for (m,) in sizes if m <= _LARGE * before]
    growth = (length / before - 1) * sum(others)
    more = min(tokens, round(growth / max(1, len(others))))

    def new_size(nodes: int) -> int:
        if nodes >= _WHOLE * before:
            return length
        if growth <= 0 or nodes > _LARGE * before:
            return max(1, round(nodes * length / before))
        return min(length, nodes + more)

    return [(new_size(m),) for (m,) in sizes]
