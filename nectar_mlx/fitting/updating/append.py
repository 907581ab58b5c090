"""More text behind the old one: nodes for its keys beside the file's own, and all of them trained for a short time."""

import math
from collections.abc import Sequence

from ...core.clock import Clock
from ...heads import Size
from ..run import FitRun
from ..samples.conversation import Conversation
from .base import FileContents, Updated, collected, read, retrained, shorter
from .revision import Revision
from .warm import WarmFit

# Nodes of a head for the new text, beside those in proportion: the error of a few falls the fastest. At most, and for
# each of its tokens.
_MORE, _PER_TOKEN = 16, 1 / 8
_SAMPLES, _FEWEST = 2.0, 0.2  # of a fit's, times the new text's share of all of it; at least
_STEPS = 0.2  # of a fit's
_RATE = 1 / 3  # of a fit's: nearly all nodes are already where they belong


def append(
    run: FitRun, file: FileContents, revision: Revision, study: Sequence[Conversation], *, clock: Clock
) -> Updated:
    """The old heads, and nodes for the new tokens."""
    old, tokens = len(revision.old), revision.appended
    context = read(run, file, revision.new)
    clock.lap("read")
    samples = int(min(1.0, max(_FEWEST, _SAMPLES * tokens / len(revision.new))) * run.n_samples(run.n_heads))
    kept = samples // 2 if study else 0
    data = collected(run, context, revision, study, kept=kept, new=samples - kept)
    clock.lap("study")
    rooms = [_room(size, tokens, old) for size in file.sizes]
    run = shorter(run, data, steps=_STEPS, rate=_RATE)
    kind = WarmFit(run, data, nodes=file.heads, places=range(old, old + tokens), rooms=rooms)
    sizes = [(size[0] + room,) for size, room in zip(file.sizes, rooms, strict=True)]
    return retrained(kind, file, sizes, clock=clock)


def _room(size: Size, tokens: int, old: int) -> int:
    """Nodes of a head for so many new tokens behind so many old ones."""
    return min(tokens, math.ceil(size[0] * tokens / old) + min(_MORE, math.ceil(_PER_TOKEN * tokens)))
