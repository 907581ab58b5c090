"""Self-study: questions about a text, and answers sampled with the full cache, for the queries that matter are those of
real answers. Replaying the text alone gives three times the divergence (docs/log/sampling.md).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from ...core.device import device
from ...core.types import Tokenizer
from ...mlxlm import prompts
from ..layers import layer_runner
from ..prefill import Context
from ..run import FitRun
from . import instructions
from .ahead import furthest, spaced
from .conversation import FEWEST_TOGETHER, Conversation, answered_checks, count_groups, count_samples
from .sampling import Recorder, chances, sample_answers
from .study_cache import allow_half

CHECK_TEMPERATURE = 0.7
_LIVE_BYTES = 9_000_000_000  # of keys and values of conversations that are sampled together, at most
# Not another batch for the last few samples: so large a share of those asked for, or for fewer conversations.
_ENOUGH, _FEW = 0.9, FEWEST_TOGETHER // 2
_ALL = 1 << 30  # tokens: more than a conversation has


class Prompts(Protocol):
    """Makes conversations number first, first + 1, … about a text, their answers still to come."""

    def __call__(
        self, tokenizer: Tokenizer, text: Sequence[int], *, first: int, count: int, seed: int
    ) -> list[Conversation]: ...


def study(run: FitRun, context: Context, recorder: Recorder | None = None) -> list[Conversation]:
    """Samples conversations about a context until they give every head its samples, and those of the check.

    recorder: sees what attention sees; answers that an interrupted run has left are fed again for it.
    """
    before, config = run.kept_conversations(), run.config
    conversations = list[Conversation]() if recorder else before
    wanted = round(run.n_samples(run.n_heads) / run.density(context))
    allow_half(run.model, context)
    most = furthest(run, context, start=context.start)
    with run.progress("sampling answers", wanted) as done:
        while True:
            samples = count_samples(conversations, group=run.group)
            number = sum(c.split != "check" for c in conversations)
            batch: list[Conversation] = []
            if samples < _ENOUGH * wanted and (wanted - samples) * number >= samples * _FEW:
                asked = asking(run.tokenizer, context.prefix, first=number, seed=config.seed)
                batch += spaced(run, expected_to_give(wanted - samples, asked, run), furthest=most, first=number)
            if not answered_checks(conversations):  # beside the others they cost little
                batch += check_conversations(
                    run.tokenizer, context.prefix, first=0, count=config.checks, seed=config.seed
                )
            if not batch:
                break
            told = batch_progress(run, batch, samples, wanted, done)
            answered = answered_before(batch, before[len(conversations) :])
            seed, first = config.seed + number, len(conversations)
            answer(run, context, batch, seed=seed, progress=told, recorder=recorder, answered=answered, first=first)
            conversations += batch
            done(min(wanted, count_samples(conversations, group=run.group)))
            if not answered:
                run.checkpoint.save_conversations(conversations)
    return conversations


def answered_before(batch: Sequence[Conversation], known: Sequence[Conversation]) -> bool:
    """Puts the answers that an interrupted run has left into a batch; False where there are none."""
    if [c.prompt for c in known[: len(batch)]] != [c.prompt for c in batch]:
        return False
    for conversation, before in zip(batch, known, strict=False):
        conversation.answer = before.answer
    return True


def expected_to_give(samples: int, asked: Iterable[Conversation], run: FitRun) -> list[Conversation]:
    """The first conversations of those `asked`, as few as give so many samples if every answer is of full length; or,
    where they are sampled in several groups, if they give the share of that which the device expects: one rank alone
    would sample the few that are missing."""
    profile = device()
    batch, training, tokens, longest = list[Conversation](), 0, 0, 0
    for conversation in asked:
        given = run.group * (training * longest if profile.end_together else tokens)
        if len(batch) >= 2 * profile.study_share:
            given = round(given * profile.expected_share)
        if given >= samples and len(batch) >= FEWEST_TOGETHER:
            break
        batch.append(conversation)
        full = len(conversation.prompt) + run.config.answer_tokens
        longest = max(longest, full)
        if conversation.split == "train":
            training, tokens = training + 1, tokens + full
    return batch


def longest_answers(run: FitRun, together: Sequence[Conversation]) -> list[int]:
    """How long the answers of conversations that are sampled together may become: as long as was chosen, or, where a
    step takes about as long for a few as for all, until the one with the longest prompt ends."""
    longest = max(len(c.prompt) for c in together) if device().end_together else 0
    return [run.config.answer_tokens + max(0, longest - len(c.prompt)) for c in together]


def side_by_side(run: FitRun, count: int, *, tokens: int) -> list[slice]:
    """How so many conversations about a context of so many tokens, in order of their prompts' lengths, are divided into
    those that are sampled together: whatever the number of ranks, for a conversation's logits are rounded otherwise
    beside others. No more together than was chosen and the memory holds.
    """
    config = run.config
    fit = max(FEWEST_TOGETHER, min(run.memory // 4, _LIVE_BYTES) // run.geometry.cache_bytes(2 * config.answer_tokens))
    scores = count * run.geometry.n_heads * tokens
    groups = count_groups(count, most=min(config.conversations, fit), scores=scores)
    return [slice(count * i // groups, count * (i + 1) // groups) for i in range(groups)]


def batch_progress(
    run: FitRun, batch: Sequence[Conversation], before: int, wanted: int, done: Callable[[int], None]
) -> Callable[[int], None]:
    """For `answer`: tells `done` the samples so far. before: those of earlier batches.

    A small batch gives enough samples long before its longest answer ends, so no more count than its share of tokens.
    """
    before, longest = min(before, wanted), max(len(c.prompt) for c in batch) + run.config.answer_tokens

    def told(tokens: int) -> None:
        given = count_samples(batch, group=run.group, until=tokens)
        done(before + min(given, (wanted - before) * tokens // longest))

    return told


def answer(
    run: FitRun,
    context: Context,
    batch: Sequence[Conversation],
    *,
    seed: int,
    progress: Callable[[int], None] = lambda tokens: None,
    recorder: Recorder | None = None,
    answered: bool = False,
    first: int = 0,
) -> None:
    """Samples the answers of a batch, as long and at the temperatures that the run's configuration says; an interrupted
    one is continued. Each rank samples some of them. progress is told the tokens of each, on average. answered: whether
    the answers are there, and only the recorder still has to see them. first: the number of the batch's first
    conversation."""
    config, world = run.config, run.world
    order = sorted(range(len(batch)), key=lambda i: len(batch[i].prompt))
    groups = [order[part] for part in side_by_side(run, len(batch), tokens=len(context.prefix))]
    mine = world.mine(groups)
    share = [batch[i] for group in mine for i in group]
    begun, at = (len(mine), 0) if answered else run.checkpoint.load_answers(share, seed=seed)
    lengths = [len(batch[group[-1]].prompt) + config.answer_tokens for group in mine]

    before, runner = (begun, at), layer_runner(run.model, run.geometry) if device().linux_cpu else None

    def sampled(number: int, at: int) -> None:
        progress((sum(lengths[:number]) + at) * max(lengths) // sum(lengths))
        if (number, at) > before:
            run.checkpoint.save_answers(share, seed=seed, group=number, at=at)

    for number, group in enumerate(mine):
        if number < begun and not recorder:
            continue
        if recorder:
            recorder.begin(first + groups.index(group))
        if number > begun:
            sampled(number, 0)
        together = [batch[i] for i in group]
        limits = longest_answers(run, together)
        sample_answers(
            run.model,
            context,
            together,
            stop=set(run.tokenizer.eos_token_ids),
            max_tokens=limits,
            temperature=[CHECK_TEMPERATURE if c.split == "check" else config.temperature for c in together],
            chances=chances(seed, group, max(limits)),
            progress=partial(sampled, number),
            at=_ALL if number < begun else at if number == begun else 0,
            recorder=recorder,
            runner=runner,
        )
    answers = [[batch[i].answer for i in group] for group in mine]
    for group, sampled_answers in zip(groups, world.in_order(answers, world.values(answers)), strict=True):
        for i, sampled_answer in zip(group, sampled_answers, strict=True):
            batch[i].answer = sampled_answer


def asking(tokenizer: Tokenizer, text: Sequence[int], *, first: int, seed: int) -> Iterator[Conversation]:
    """Conversations number first, first + 1, … about a text, without end, their answers still to come; one in ten is
    held out, whatever the batches: were it one of each batch, a batch of one would give no samples.
    """
    questions = instructions.training(partial(instructions.passage, tokenizer, text), seed=seed + first)
    for number, question in enumerate(questions, first):
        yield Conversation(prompts.prompt(tokenizer, question), split="train" if number % 10 else "held_out")


def training_conversations(
    tokenizer: Tokenizer, text: Sequence[int], *, first: int, count: int, seed: int
) -> list[Conversation]:
    """So many of `asking`."""
    return list(itertools.islice(asking(tokenizer, text, first=first, seed=seed), count))


def check_conversations(
    tokenizer: Tokenizer, text: Sequence[int], *, first: int, count: int, seed: int
) -> list[Conversation]:
    """Conversations about a text by which a finished file is checked, their answers still to come. first: as above."""
    questions = instructions.checking(partial(instructions.passage, tokenizer, text), seed=seed + first)
    return [Conversation(prompts.prompt(tokenizer, q), split="check") for q in itertools.islice(questions, count)]
