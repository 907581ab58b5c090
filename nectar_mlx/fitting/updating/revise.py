"""A file's heads trained on for a text that was changed, from where they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.clock import Clock
from ..run import FitRun
from ..samples.conversation import Conversation
from .base import FileContents, Updated, collected, read, retrained, shorter
from .revision import Revision
from .warm import WarmFit, moved_nodes

# Nodes of a head for the new tokens, beside those in proportion: the error of a few falls the fastest. At most, and for
# each of them.
_MORE, _PER_TOKEN = 16, 1 / 8


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What an update takes of a fit: samples of conversations that were kept, and of new ones for each share of the
    text that is new; steps, and their rate. fresh: whether a head may start from Attention Matching of all keys."""

    kept: float
    new: float
    steps: float
    rate: float
    fresh: bool


# Behind a text nearly all nodes are already where they belong; a change within it moves what follows.
APPEND = Effort(kept=0.2, new=1.2, steps=0.4, rate=1 / 2, fresh=False)
EDIT = Effort(kept=0.45, new=1.0, steps=0.5, rate=1.0, fresh=True)


def revise(
    run: FitRun,
    file: FileContents,
    revision: Revision,
    study: Sequence[Conversation],
    effort: Effort,
    *,
    clock: Clock,
) -> Updated:
    """Heads for the new text. study: the conversations that were kept, of the old one."""
    context = read(run, file, revision.new)
    clock.lap("read")
    usual, share = run.n_samples(run.n_heads), revision.share
    kept = int(min(1.0, effort.kept + share) * usual)
    new = int(min(1.0, effort.new * share) * usual)
    data = collected(run, context, revision, study, kept=kept, new=new if study else new + kept)
    clock.lap("study")
    places = [place for start, end in revision.changed for place in range(start, end)]
    sizes = _sizes(file, revision)
    rooms = [_room(m, len(places), context.length) for (m,) in sizes]
    kind = WarmFit(
        shorter(run, data, steps=effort.steps, rate=effort.rate),
        data,
        nodes=moved_nodes(run, file.banks, context, revision.kept),
        places=places,
        rooms=rooms,
        fresh=effort.fresh,
    )
    if not revision.appended and all(part.moved == 0 for part in revision.kept):
        kind.settle(file)
    return retrained(kind, file, sizes, clock=clock)


def _sizes(file: FileContents, revision: Revision) -> list[tuple[int]]:
    """In proportion to the text's length: a head that kept every key keeps every key."""
    n = len(revision.new)
    return [(min(n, max(1, round(size[0] * n / len(revision.old)))),) for size in file.sizes]


def _room(nodes: int, tokens: int, length: int) -> int:
    """How many of a head's nodes are for so many new tokens, of all of the text."""
    return min(tokens, nodes // 2, math.ceil(nodes * tokens / length) + min(_MORE, math.ceil(_PER_TOKEN * tokens)))
