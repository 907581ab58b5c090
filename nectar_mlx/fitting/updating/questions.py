"""Which conversations an update learns from: some of those that were kept, and new ones about what is new."""

import math
from collections.abc import Sequence
from statistics import median

from ..run import FitRun
from ..samples.conversation import Conversation, count_samples
from ..samples.self_study import check_conversations, training_conversations
from .revision import Revision

_FEWEST = 6  # conversations that are sampled: fewer take nearly as long
_CHECKS = 0.25  # of a fit's check questions, beside those about what is new
_NEW_CHECKS = 1 / 8  # of a fit's check questions, about what is new; at least two
_AROUND = 60  # tokens before a new passage that questions about it may quote
_DRAWN = 4  # prompts, of which one is asked: one of about the same length as the others


def some(kept: Sequence[Conversation], run: FitRun, *, samples: int) -> list[Conversation]:
    """Of the conversations that were kept some of the check, and of the others as many as give so many samples a head;
    of those that are held out at least one."""
    chosen = [c for c in kept if c.split == "check"][: max(2, round(_CHECKS * run.config.checks))]
    share = min(1.0, samples / max(1, count_samples(kept, group=run.group)))
    for split in ("train", "held_out"):
        of = [c for c in kept if c.split == split]
        count = math.ceil(share * len(of))
        chosen += [of[i * len(of) // count] for i in range(count)]
    return chosen


def about_the_new(run: FitRun, revision: Revision, kept: Sequence[Conversation], *, samples: int) -> list[Conversation]:
    """Conversations about the new passages that give about so many samples a head, their answers still to come; where
    none are kept, half of them are about the whole text.

    Their prompts are of about one length: of those that are sampled in step, what is longer is read token by token.
    """
    config, whole = run.config, list(revision.new)
    passages = [whole[start:end] for start, end in revision.passages(_AROUND)] or [whole]
    passages += [] if kept else [whole] * len(passages)
    most = _FEWEST + samples // (run.group * config.answer_tokens)
    drawn = [
        training_conversations(run.tokenizer, passage, first=len(kept) + at, count=_DRAWN * most, seed=config.seed)
        for at, passage in enumerate(passages)
    ]
    length = median(len(c.prompt) for of in drawn for c in of)
    count = max(_FEWEST, math.ceil(samples / (run.group * (length + config.answer_tokens))))
    asked = _shared_out([_alike(of, length) for of in drawn], count)
    batch = [Conversation(c.prompt, split="train" if n % 10 else "held_out") for n, c in enumerate(asked, len(kept))]
    checks = max(2, math.ceil(_NEW_CHECKS * config.checks)) if kept else config.checks
    drawn = [
        check_conversations(run.tokenizer, passage, first=len(kept) + at, count=_DRAWN * checks, seed=config.seed)
        for at, passage in enumerate(passages)
    ]
    return batch + _shared_out([_alike(of, length) for of in drawn], checks)


def _alike(conversations: Sequence[Conversation], length: float) -> list[Conversation]:
    """Those first whose prompts are nearest to this length."""
    return sorted(conversations, key=lambda c: abs(len(c.prompt) - length))


def _shared_out(passages: Sequence[Sequence[Conversation]], count: int) -> list[Conversation]:
    """So many conversations, of each passage the first ones and about as many as of the others."""
    in_turn = [of[at] for at in range(max(map(len, passages))) for of in passages if at < len(of)]
    return in_turn[:count]
