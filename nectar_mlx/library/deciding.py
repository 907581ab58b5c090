"""Which of several close documents answers a question: the one with a sentence that says what the model answers behind
its file, what was asked, and what the answer adds to it.

How sure the model is of an answer does not tell: behind a text that speaks of the same thing without the answer it
takes a number from elsewhere, and is as sure of it (docs/log/composition.md).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.words import words
from ..documents import FileReport, Reading

if TYPE_CHECKING:
    from ..retrieval.passages import Passages

_LEAST = 0.5  # a sentence that says less of an answer does not say it, as for marks in answers
_OTHERS = 0.5  # what it counts that another document says the same: it may be what all say about the question


def support(question: str, answers: Sequence[str], texts: Sequence[str]) -> list[float]:
    """How far each text says what was answered behind it, and the others do not; in [-0.5, 1], 0 where it does not.

    answers: the first sentence of the answer behind each text; "" for none.
    """
    from ..retrieval.passages import Passages  # loads MLX

    passages = [Passages(Reading(t, [FileReport("", "text", len(t), 0, len(t))])) for t in texts]
    said = np.array([[_said(of, question, answer) for of in passages] for answer in answers])
    own = said.diagonal().copy()
    np.fill_diagonal(said, 0.0)
    found: list[float] = (own - _OTHERS * said.max(1)).tolist()
    return found


def _said(passages: "Passages", question: str, answer: str) -> float:
    """How much of answer and question one sentence of the text says, in [0, 1]; 0 where none says the answer. It counts
    half where it says nothing that the answer adds to the question: texts that only speak of the same thing do that."""
    from ..retrieval.citing import support

    if not answer:
        return 0.0
    known = set(words(question))
    added = " ".join(word for word in words(answer) if word not in known)
    said = support(passages, question, answer)
    both = (said + support(passages, "", question)) / 2 * (1 + support(passages, "", added)) / 2
    return float(both[said >= _LEAST].max(initial=0.0))
