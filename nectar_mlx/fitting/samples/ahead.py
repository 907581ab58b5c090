"""Conversations further on than right behind their text.

With every turn a question stands further from the text: its query is turned further against the same keys (RoPE, arXiv
2104.09864). Heads that are fitted right behind the text alone answer worse there, so some conversations begin at later
positions, as if other talk lay between (docs/log/sampling.md).
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...mlxlm.window import window
from ..prefill import Context
from ..run import FitRun
from .conversation import Conversation

FURTHEST = 1 << 20  # positions: more than any
_TALK, _APPENDED = 1 << 10, 1 / 8  # positions that a talk takes, and, of the text, more of it
_SHARE = 0.25  # of the conversations: with more of them first turns are answered less closely
_ROOM = 1 << 10  # positions that a conversation takes itself, with its answer
_PROBED, _BY = 8, 3  # tokens and positions by which is found out whether a model can
_ALIKE = 2e-2  # of the largest number that the model gives: what roundings of half precision do


def spaced(run: FitRun, conversations: Sequence[Conversation], *, furthest: int, first: int) -> Sequence[Conversation]:
    """Those of a batch that are trained on or held out, at their positions, at most so much further on. first: the
    number of the first of them: a conversation's position follows from its number, whatever the others are."""
    for number, conversation in enumerate(conversations, first):
        if furthest and conversation.split != "check":
            chosen, place = np.random.default_rng((run.config.seed, number, 1)).random(2)
            conversation.ahead = int(place**2 * furthest) if chosen < _SHARE else 0
    return conversations


def furthest(run: FitRun, context: Context, *, start: int) -> int:
    """How many positions further on than `start`, right behind the text, a conversation may begin, at most: 0 where
    sequences of a batch cannot stand at positions of their own, as in models that have no rotary embedding. context: of
    the text, or of a passage of it."""
    positions, room = window(run.model), min(FURTHEST, max(_TALK, round(_APPENDED * start)))
    before = context.others.positions if context.others else 0  # all that is in view lies within the window
    room = room if positions is None else min(room, positions - before - start - _ROOM)
    return room if room > 0 and _can(run, context) else 0


def _can(run: FitRun, context: Context) -> bool:
    """Whether the model computes for two sequences side by side what it does for each alone."""
    tokens = mx.array([context.prefix[-_PROBED:]] * 2)

    def last(tokens: mx.array, ahead: Sequence[int]) -> np.ndarray:
        caches = context.make_cache(ahead=ahead)
        return np.array(run.model(tokens, cache=caches)[:, -1].astype(mx.float32))

    try:
        alone, together = [last(tokens[:1], [by]) for by in (0, _BY)], last(tokens, [0, _BY])
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError):  # whatever it does with two positions
        return False
    return bool(np.abs(together - np.concatenate(alone)).max() <= _ALIKE * np.abs(alone[0]).max())
