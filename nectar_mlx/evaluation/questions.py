"""What is asked while evaluating: held-out questions of several kinds, or one's own from a file."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import cli
from ..baselines import EvalContext
from ..core.device import device
from ..errors import NectarError
from ..fitting.samples import instructions
from ..fitting.samples.conversation import Conversation
from ..mlxlm import prompts

ON, OFF, REREAD, CONTINUE = "on-context", "off-context", "re-reading", "continuation"
OWN_WORDS = "own words"  # of the on-context answers, what does not repeat the text
TEMPERATURE = 0.7
_CUE, _REREAD = 16, 64  # tokens of a passage that are shown, and that are to follow
_RECITED = 8  # tokens


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One held-out conversation. question: for a person. expected: what a right answer contains; depth: where in the
    text it stands, 0 … 1. choices: answers of which one is right. number: of the question, which several answers
    share."""

    question: str
    kind: str
    conversation: Conversation = field(repr=False)
    expected: str | None = None
    depth: float | None = None
    choices: tuple[str, ...] = ()
    number: int = 0


def held_out(task: EvalContext, *, count: int, seed: int) -> list[Asked]:
    """`count` questions about the text, half as many that have nothing to do with it, and a quarter each of passages
    to be re-read and of continuations. Other templates and seeds than a fit's; the answers of all but the passages
    are to be sampled.
    """
    rng = random.Random(seed)
    generic, unrelated = (
        rng.sample(q, len(q)) for q in (instructions.HELD_OUT_GENERIC, instructions.HELD_OUT_UNRELATED)
    )
    about = instructions.HELD_OUT_ABOUT
    asked = []
    for i in range(count):  # one generic question for three about passages
        text = generic[i // 4 % len(generic)] if i % 4 == 3 else about[i % len(about)].format(passage=task.passage(rng))
        asked.append(Asked(question=text, kind=ON, conversation=Conversation(task.ask(text))))
    for i in range(max(1, count // 2)):
        text = unrelated[i % len(unrelated)]
        asked.append(Asked(question=text, kind=OFF, conversation=Conversation(task.ask(text))))
    for _ in range(max(1, count // 4)):
        asked.append(_reread(task, rng))
        again = Conversation(prompts.encode(task.tokenizer, "\n\n", specials=False))
        asked.append(Asked(question="(the text goes on)", kind=CONTINUE, conversation=again))
    return asked


def _reread(task: EvalContext, rng: random.Random) -> Asked:
    """A passage of the text once more: what follows its first words is the text's own."""
    ids = task.context.prefix[len(task.head) :]
    cue = max(1, min(_CUE, len(ids) // 4))
    rest = max(1, min(_REREAD, len(ids) // 2))
    start = rng.randrange(0, max(1, len(ids) - cue - rest))
    opening = prompts.encode(task.tokenizer, "\n\n", specials=False) + ids[start : start + cue]
    conversation = Conversation(opening, ids[start + cue : start + cue + rest])
    text = str(task.tokenizer.decode(ids[start : start + cue], skip_special_tokens=True)).strip()
    return Asked(question=f"{text} …", kind=REREAD, conversation=conversation)


def from_file(path: Path, ask: Callable[[str], list[int]]) -> list[Asked]:
    """One question a line, or JSON lines {"question", "answer"?, "depth"?, "choices"?, "kind"?}; NectarError if the
    file holds none.

    "answer" is what a right answer contains, a name or a number; "choices" are whole answers, one of them right.
    ask: a question -> what follows the prefix.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise NectarError(f"cannot read questions from {path}: {getattr(error, 'strerror', None) or error}") from None
    asked = [_question(line, ask, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line]
    if not asked:
        raise NectarError(f"{path} holds no question: write one a line")
    return asked


def _question(line: str, ask: Callable[[str], list[int]], place: str) -> Asked:
    told: dict[str, Any] = {"question": line}
    if line.startswith("{"):
        try:
            told = json.loads(line)
        except json.JSONDecodeError as error:
            raise NectarError(f"{place}: not JSON ({error.msg})") from None
    question, answer, depth = told.get("question"), told.get("answer"), told.get("depth")
    if not isinstance(question, str) or not question.strip():
        raise NectarError(f'{place}: a "question" is missing')
    if not isinstance(answer, str | int | float | None) or not isinstance(depth, int | float | None):
        raise NectarError(f'{place}: "answer" must be text and "depth" a number')
    expected, choices = None if answer is None else str(answer), told.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise NectarError(f'{place}: "choices" must be a list of texts')
    if choices and sum(contains(c, expected or "") for c in choices) != 1:
        raise NectarError(f'{place}: exactly one of the "choices" must contain the "answer"')
    kind = OFF if told.get("kind") == OFF else ON
    return Asked(
        question=question,
        kind=kind,
        conversation=Conversation(ask(question)),
        expected=expected,
        depth=depth,
        choices=tuple(choices),
    )


def contains(answer: str, expected: str) -> bool:
    """Whether the answer holds the expected words, as words: 18 is not in 1847; case, commas and spacing do not
    matter."""
    words = [re.findall(r"\w+", re.sub(r"(?<=\d),(?=\d)", "", t).casefold()) for t in (answer, expected)]
    given, wanted = words
    return bool(wanted) and any(given[i : i + len(wanted)] == wanted for i in range(len(given) - len(wanted) + 1))


def numbered(asked: Sequence[Asked], *, samples: int) -> list[Asked]:
    """Every question with its number, and `samples` times where its answer is still to be sampled."""
    return [
        replace(a, number=i, conversation=Conversation(a.conversation.prompt, list(a.conversation.answer)))
        for i, a in enumerate(asked)
        for _ in range(1 if a.conversation.answer else samples)
    ]


def recited(prefix: Sequence[int], asked: Sequence[Asked]) -> np.ndarray:
    """Which answer tokens, of all answers in order, repeat the text word for word: they are part of _RECITED tokens in
    a row that stand in it."""
    known = {tuple(prefix[i : i + _RECITED]) for i in range(len(prefix) - _RECITED + 1)}
    found = []
    for a in asked:
        answer = a.conversation.answer
        mine = np.zeros(len(answer), dtype=bool)
        for i in range(len(answer) - _RECITED + 1):
            if tuple(answer[i : i + _RECITED]) in known:
                mine[i : i + _RECITED] = True
        found.append(mine)
    return np.concatenate(found)


def sample_answers(task: EvalContext, asked: Sequence[Asked], *, seed: int) -> None:
    """Fills in the answers that are missing, sampled with the full cache."""
    missing = [a.conversation for a in asked if not a.conversation.answer]
    batch = device().baseline_batch
    missing.sort(key=lambda c: len(c.prompt))
    with cli.progress("answering with the full cache", len(missing)) as done:
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            task.converse(task.context, part, seed=seed + start, temperature=TEMPERATURE)
            done(start + len(part))
