"""The questions of an evaluation: held-out ones of several kinds, or the user's own from a file."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..baselines import EvalContext
from ..core.device import device
from ..core.progress import Progress, silent
from ..core.types import JsonObject
from ..errors import NectarError
from ..fitting.samples import instructions
from ..fitting.samples.conversation import Conversation
from ..mlxlm import prompts
from ..mlxlm.window import window

ON, OFF, REREAD, CONTINUE = "on-context", "off-context", "re-reading", "continuation"
LATER = "later turn"
OWN_WORDS = "own words"  # the tokens of on-context answers that do not repeat the text
TEMPERATURE = 0.7
_CUE, _REREAD = 16, 64  # tokens of a passage: shown, and expected to follow
_TURNS = 3  # that stand before a later turn
_LATER_SEED = 104_729  # of later turns, beside the evaluation's seed
_RECITED = 8  # tokens in a row that also stand in the text: these repeat it


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A right answer. answer: words that it contains. depth: where in the text they stand, 0 … 1. choices: whole
    answers, of which one is right."""

    answer: str
    depth: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Question:
    """One held-out conversation. text: the question, for a person. number: the same for all answers to one question."""

    text: str
    kind: str
    conversation: Conversation = field(repr=False)
    expected: Expected | None = None
    number: int = 0


def held_out(ctx: EvalContext, *, count: int, seed: int) -> list[Question]:
    """`count` questions about the text, half as many that have nothing to do with it, and a quarter each of passages
    to re-read and of continuations. Templates and seeds are not those of a fit. Only the passages have their answers
    yet.
    """
    rng = random.Random(seed)
    generic = rng.sample(instructions.HELD_OUT_GENERIC, len(instructions.HELD_OUT_GENERIC))
    unrelated = rng.sample(instructions.HELD_OUT_UNRELATED, len(instructions.HELD_OUT_UNRELATED))
    about = instructions.HELD_OUT_ABOUT
    questions = []
    for i in range(count):  # one generic question for three about passages
        text = generic[i // 4 % len(generic)] if i % 4 == 3 else about[i % len(about)].format(passage=ctx.passage(rng))
        questions.append(Question(text=text, kind=ON, conversation=Conversation(ctx.ask(text))))
    for i in range(max(1, count // 2)):
        text = unrelated[i % len(unrelated)]
        questions.append(Question(text=text, kind=OFF, conversation=Conversation(ctx.ask(text))))
    for _ in range(max(1, count // 4)):
        questions.append(_reread(ctx, rng))
        continuation = Conversation(prompts.encode(ctx.tokenizer, "\n\n", specials=False))
        questions.append(Question(text="(the text goes on)", kind=CONTINUE, conversation=continuation))
    return questions


def _reread(ctx: EvalContext, rng: random.Random) -> Question:
    """The first words of a passage of the text; the answer is what follows them in the text."""
    ids = ctx.context.prefix[len(ctx.head) :]
    cue = max(1, min(_CUE, len(ids) // 4))
    rest = max(1, min(_REREAD, len(ids) // 2))
    start = rng.randrange(0, max(1, len(ids) - cue - rest))
    prompt = prompts.encode(ctx.tokenizer, "\n\n", specials=False) + ids[start : start + cue]
    conversation = Conversation(prompt, ids[start + cue : start + cue + rest])
    return Question(text=f"{text(ctx, ids[start : start + cue])} …", kind=REREAD, conversation=conversation)


def later_turns(ctx: EvalContext, asked: Sequence[Question], *, count: int, samples: int, seed: int) -> list[Question]:
    """`count` questions about passages, each `samples` times, behind talks of first turns: questions about the text
    that were asked, with the full cache's answers. Fewer where the window has no room for a talk; NectarError for none,
    and where the chat template takes no talk.
    """
    rng, about = random.Random(seed + _LATER_SEED), instructions.HELD_OUT_ABOUT
    first = list({q.number: q for q in asked if q.kind == ON}.values())
    turns = min(_TURNS, len(first) // count)
    questions = []
    for i in range(count):
        question = about[i % len(about)].format(passage=ctx.passage(rng))
        if conversation := _behind(ctx, first[turns * i : turns * (i + 1)], question):
            questions.append(Question(text=question, kind=LATER, conversation=conversation))
    if not questions:
        raise NectarError("behind the text the model's window has no room for a talk")
    return numbered(questions, samples=samples, first=1 + max(q.number for q in asked))


def _behind(ctx: EvalContext, turns: Sequence[Question], question: str) -> Conversation | None:
    """The question behind as many of these turns, the last ones, as the window has room for; None behind none."""
    size = window(ctx.model)
    for start in range(len(turns)):
        messages = []
        for turn in turns[start:]:
            messages.append({"role": "user", "content": turn.text})
            messages.append({"role": "assistant", "content": text(ctx, turn.conversation.answer)})
        prompt = prompts.prompt(ctx.tokenizer, [*messages, {"role": "user", "content": question}])
        if size is None or ctx.context.start + len(prompt) + ctx.config.answer_tokens <= size:
            return Conversation(prompt, question=question)
    return None


def text(ctx: EvalContext, tokens: Sequence[int]) -> str:
    """An answer as a person reads it."""
    return str(ctx.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def from_file(path: Path, ask: Callable[[str], list[int]]) -> list[Question]:
    """One question a line, or JSON lines {"question", "answer"?, "depth"?, "choices"?, "kind"?}; NectarError if the
    file holds none.

    "answer" is what a right answer contains, a name or a number; "choices" are whole answers, of which one is right.
    ask: returns the tokens that follow the prefix, for a question.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise NectarError(f"cannot read questions from {path}: {getattr(error, 'strerror', None) or error}") from None
    questions = [_question(line, ask, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line]
    if not questions:
        raise NectarError(f"{path} holds no question: write one a line")
    return questions


def _question(line: str, ask: Callable[[str], list[int]], place: str) -> Question:
    entry: JsonObject = {"question": line}
    if line.startswith("{"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NectarError(f"{place}: not JSON ({getattr(error, 'msg', error)})") from None
    text = entry.get("question")
    if not isinstance(text, str) or not text.strip():
        raise NectarError(f'{place}: a "question" is missing')
    return Question(
        text=text,
        kind=OFF if entry.get("kind") == OFF else ON,
        conversation=Conversation(ask(text)),
        expected=_expected(entry, place),
    )


def _expected(entry: JsonObject, place: str) -> Expected | None:
    answer, depth, choices = entry.get("answer"), entry.get("depth"), entry.get("choices", [])
    if not isinstance(answer, str | int | float | None) or not isinstance(depth, int | float | None):
        raise NectarError(f'{place}: "answer" must be text and "depth" a number')
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise NectarError(f'{place}: "choices" must be a list of texts')
    words = "" if answer is None else str(answer)
    if choices and sum(contains(choice, words) for choice in choices) != 1:
        raise NectarError(f'{place}: exactly one of the "choices" must contain the "answer"')
    return None if answer is None else Expected(answer=words, depth=depth, choices=tuple(choices))


def contains(answer: str, expected: str) -> bool:
    """Whether the answer has the expected words, as whole words: 18 is not in 1847. Case, commas and spacing do not
    matter."""
    words, wanted = _words(answer), _words(expected)
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"(?<=\d),(?=\d)", "", text).casefold())


def numbered(questions: Sequence[Question], *, samples: int, first: int = 0) -> list[Question]:
    """Every question with its number, from `first` on: once if it has its answer, else `samples` times."""
    return [
        replace(q, number=i, conversation=replace(q.conversation, answer=list(q.conversation.answer)))
        for i, q in enumerate(questions, first)
        for _ in range(1 if q.conversation.answer else samples)
    ]


def recited(prefix: Sequence[int], questions: Sequence[Question]) -> npt.NDArray[np.bool_]:
    """Which answer tokens, of all answers in order, repeat the text: they belong to _RECITED tokens in a row that also
    stand in it."""
    known = {tuple(prefix[i : i + _RECITED]) for i in range(len(prefix) - _RECITED + 1)}
    masks = []
    for question in questions:
        answer = question.conversation.answer
        mask = np.zeros(len(answer), dtype=bool)
        for i in range(len(answer) - _RECITED + 1):
            if tuple(answer[i : i + _RECITED]) in known:
                mask[i : i + _RECITED] = True
        masks.append(mask)
    return np.concatenate(masks)


def sample_answers(ctx: EvalContext, questions: Sequence[Question], *, seed: int, progress: Progress = silent) -> None:
    """Fills in the answers that are missing, sampled with the full cache."""
    missing = [q.conversation for q in questions if not q.conversation.answer]
    missing.sort(key=lambda c: len(c.prompt))
    size = device().baseline_batch
    with progress("answering with the full cache", len(missing)) as update:
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            ctx.sample_answers(ctx.full_cache, batch, seed=seed + start, temperature=TEMPERATURE)
            update(start + len(batch))
