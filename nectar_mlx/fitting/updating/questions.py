"""Which conversations an update learns from: some of those that were kept, and new ones about what is new."""

import math
from collections.abc import Sequence

from ..config import FitConfig
from ..run import FitRun
from ..samples.conversation import Conversation, count_samples
from ..samples.self_study import check_conversations, training_conversations
from .revision import Revision

_FEWEST = 4  # conversations that are sampled: fewer take nearly as long
_CHECKS = 3 / 16  # of a fit's check questions, beside those about what is new
_NEW_CHECKS = 1 / 16  # of a fit's check questions, about what is new
_CHOICE = 128  # questions about a passage, at least, of which those of about one length are asked
_AROUND = 60  # tokens before a new passage that questions about it may quote


def some(kept: Sequence[Conversation], run: FitRun, *, samples: int) -> list[Conversation]:
    """Of the conversations that were kept some of the check, and of the others as many as give so many samples a head;
    of those that are held out at least one."""
    chosen = [c for c in kept if c.split == "check"][: _kept_checks(run.config)]
    share = min(1.0, samples / max(1, count_samples(kept, group=run.group)))
    for split in ("train", "held_out"):
        of = [c for c in kept if c.split == split]
        count = math.ceil(share * len(of))
        chosen += [of[i * len(of) // count] for i in range(count)]
    return chosen


def about_the_new(run: FitRun, revision: Revision, kept: Sequence[Conversation], *, samples: int) -> list[Conversation]:
    """Conversations about the new passages that give about so many samples a head, their answers still to come, of
    about one length; where none are kept, of all lengths, and half of them about the whole text."""
    config, whole = run.config, list(revision.new)
    passages = [whole[start:end] for start, end in revision.passages(_AROUND)] or [whole]
    passages += [] if kept else [whole] * len(passages)
    most = _FEWEST + samples // (run.group * config.answer_tokens)
    checks = _new_checks(config) if kept else config.checks
    training, checking, length = list[list[Conversation]](), list[list[Conversation]](), 0
    for first, passage in enumerate(passages, len(kept)):
        options = {"first": first, "seed": config.seed}
        training.append(training_conversations(run.tokenizer, passage, count=max(most, _CHOICE), **options))
        checking.append(check_conversations(run.tokenizer, passage, count=max(checks, _CHOICE), **options))
        length = length or sorted(len(c.prompt) for c in training[0])[len(training[0]) // 2]
    if kept:
        training, checking = ([_alike(each, length) for each in of] for of in (training, checking))
    asked = _enough(_in_turn(training), run, samples=samples)
    batch = [Conversation(c.prompt, split="train" if n % 10 else "held_out") for n, c in enumerate(asked, len(kept))]
    return batch + _in_turn(checking)[:checks]


def count_checks(config: FitConfig) -> int:
    """How many check questions an update asks, where some are kept."""
    return _kept_checks(config) + _new_checks(config)


def _kept_checks(config: FitConfig) -> int:
    return max(2, round(_CHECKS * config.checks))


def _new_checks(config: FitConfig) -> int:
    return math.ceil(_NEW_CHECKS * config.checks)


def _alike(conversations: Sequence[Conversation], length: int) -> list[Conversation]:
    """Those whose prompts are about so long come first: the rest of a longer prompt is read token by token while
    shorter ones are answered."""
    return sorted(conversations, key=lambda c: abs(len(c.prompt) - length))


def _enough(conversations: Sequence[Conversation], run: FitRun, *, samples: int) -> list[Conversation]:
    """The first ones, as many as will give so many samples a head."""
    given = 0
    for count, conversation in enumerate(conversations):
        if given >= samples and count >= _FEWEST:
            return list(conversations[:count])
        given += run.group * (len(conversation.prompt) + run.config.answer_tokens)
    return list(conversations)


def _in_turn(passages: Sequence[Sequence[Conversation]]) -> list[Conversation]:
    """One of each passage, then the next of each."""
    return [c for turn in zip(*passages, strict=True) for c in turn]
