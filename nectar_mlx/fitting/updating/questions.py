"""Which conversations an update learns from: some of those that were kept, and new ones about what is new."""

import math
import random
from collections.abc import Sequence

from ...mlxlm import prompts
from ..config import FitConfig
from ..run import FitRun
from ..samples import instructions
from ..samples.conversation import Conversation, count_samples, spread
from ..samples.self_study import check_conversations, training_conversations
from .revision import Revision

_FEWEST = 4  # conversations that are sampled: fewer take nearly as long
_CHECKS = 1 / 4  # of a fit's check questions
_NEW_CHECKS, _NEW_SHARE = 8, 1 / 8  # check questions about what is new, at least, and of a fit's
_PHRASE, _LEAD = (3, 9), 6  # tokens of the phrases that these quote, and before a change, where one may begin
_CHOICE = 128  # questions about a passage, at least, of which those of about one length are asked
_AROUND = 60  # tokens before a new passage that questions about it may quote


def some(kept: Sequence[Conversation], run: FitRun, *, samples: int) -> list[Conversation]:
    """Of the conversations that were kept some of the check, and of the others as many as give so many samples a head;
    of those that are held out at least one."""
    of_check = [c for c in kept if c.split == "check"]
    chosen = spread(of_check, min(len(of_check), count_checks(run.config)))
    share = min(1.0, samples / max(1, count_samples(kept, group=run.group)))
    for split in ("train", "held_out"):
        of = [c for c in kept if c.split == split]
        chosen += spread(of, math.ceil(share * len(of)))
    return chosen


def about_the_new(run: FitRun, revision: Revision, kept: Sequence[Conversation], *, samples: int) -> list[Conversation]:
    """Conversations about the new passages that give about so many samples a head, their answers still to come, of
    about one length; where none are kept, of all lengths, half of them about the whole text, and those of a check."""
    config, whole = run.config, list(revision.new)
    passages = [whole[start:end] for start, end in revision.passages(_AROUND)] or [whole]
    passages += [] if kept else [whole] * len(passages)
    most = _FEWEST + samples // (run.group * config.answer_tokens)
    training = [
        training_conversations(run.tokenizer, passage, first=first, count=max(most, _CHOICE), seed=config.seed)
        for first, passage in enumerate(passages, len(kept))
    ]
    if kept:
        length = sorted(len(c.prompt) for c in training[0])[len(training[0]) // 2]
        training = [_alike(each, length) for each in training]
    asked = _enough(_in_turn(training), run, samples=samples)
    first = len(kept) if any(c.split == "held_out" for c in kept) else 0  # the first one of all is held out
    batch = [Conversation(c.prompt, split="train" if n % 10 else "held_out") for n, c in enumerate(asked, first)]
    whole_text = {"first": len(kept), "count": 0 if kept else config.checks, "seed": config.seed}
    return batch + check_conversations(run.tokenizer, whole, **whole_text)


def checking_the_new(run: FitRun, revision: Revision) -> list[Conversation]:
    """The check's conversations about what is new, their answers still to come: short questions about phrases that lie
    evenly in all that is new, or, where nothing is, in what was left out. A question that quoted the passage would tell
    the model what it is to be asked about."""
    text, passages = (revision.new, revision.passages(_LEAD)) if revision.changed else (revision.old, revision.left_out)
    places = [(at, start, end) for start, end in passages for at in range(start, end)]
    rng, count, asked = random.Random(run.config.seed), count_new_checks(run.config), list[Conversation]()
    for number in range(count):
        at, start, end = places[(2 * number + 1) * len(places) // (2 * count)]
        length = rng.randrange(*_PHRASE)
        at = max(start, min(at, end - length))
        phrase = str(run.tokenizer.decode(text[at : min(end, at + length)], skip_special_tokens=True)).strip()
        template = instructions.CHECK_PHRASE[number % len(instructions.CHECK_PHRASE)]
        asked.append(Conversation(prompts.prompt(run.tokenizer, template.format(phrase=phrase)), split="check"))
    return asked


def count_checks(config: FitConfig) -> int:
    """How many check questions about the whole text an update asks, where some are kept."""
    return max(2, round(_CHECKS * config.checks))


def count_new_checks(config: FitConfig) -> int:
    """How many an update asks about what is new."""
    return max(_NEW_CHECKS, round(_NEW_SHARE * config.checks))


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
