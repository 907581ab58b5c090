"""The sources of an answer: the passages of the text that say what it says, with their documents and places.

A passage is found by the words of question and answer (`passages`), and, where exact keys were read, by the attention
that its own keys took while the answer was written.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..core import terminal
from ..core.types import DoubleArray, FloatArray, JsonObject, Tokenizer
from ..mlxlm import prompts
from ..store.tensor_file import Arrays
from .passages import Passage, Passages

_LEAST = 0.12  # a passage that says less of question and answer is no source
_BEHIND = 0.5  # nor is one that says so much less than the best


@dataclass(frozen=True)
class Source:
    """A passage that an answer rests on.

    Attributes:
        document: the file's name.
        place: "page 12", "chapter 3: The Storm", "sheet Costs", "mail 4", "line 80", "section Dose"; "" if none.
        score: in [0, 1], how much of question and answer it says, or with exact keys how much they attend to it.
        start, end: its characters in the text as it was read.
        text: the passage as the document spells it.
    """

    document: str
    place: str
    score: float
    start: int
    end: int
    text: str

    def quoted(self) -> str:
        """One line for a person."""
        return terminal.quoted(self.document, self.place, self.score, self.text)


def sources_as_json(sources: Sequence[Source]) -> list[JsonObject]:
    """For JSON: document, place, score, start, end and text of each."""
    return [asdict(source) for source in sources]


def find(
    passages: Passages,
    question: str,
    answer: str,
    *,
    attention: DoubleArray | None = None,
    within: tuple[int, int] | None = None,
    count: int = 3,
) -> list[Source]:
    """The passages that say most of question and answer, at most `count`, the best first.

    Args:
        attention: what `attended` gives, where exact keys were read.
        within: the characters of the text that they must touch.
    """
    if not passages.all:
        return []
    scores = passages.scores(question, without_thoughts(answer))
    if attention is not None:
        scores = (scores + attention) / 2 if scores.any() else attention
    if within is not None:
        ends = np.array([passage.end for passage in passages.all])
        inside = (ends > within[0]) & (passages.starts < within[1])
        scores = np.where(inside, scores, 0.0)
    order = np.argsort(-scores, kind="stable")[:count]
    least = max(_LEAST, _BEHIND * float(scores[order[0]]))
    return [source_of(passages, n, float(scores[n])) for n in order.tolist() if scores[n] >= least]


def attended(passages: Passages, small: Arrays, mass: FloatArray | DoubleArray) -> DoubleArray | None:
    """[passages], in [0, 1]: the attention to each beside the most attended one; None where there was none.

    small: of a file of keys. mass: [n], the attention to each token of the prefix.
    """
    if "sources.offsets" not in small or not passages.all:
        return None
    starts = small["sources.offsets"][:, 0]
    inside = starts >= 0  # the template's own tokens are no source
    number = np.searchsorted(passages.starts, starts[inside], side="right") - 1
    taken = np.bincount(np.maximum(number, 0), mass[inside], len(passages.all))
    return taken / taken.max() if taken.max() > 0 else None


def arrays(tokenizer: Tokenizer, text: str, prefix: list[int]) -> Arrays:
    """The text, and for each token of the prefix the characters [start, end) that it stands for, -1 for the template's
    own. Empty for tokenizers without character offsets.
    """
    ids, located = prompts.located(tokenizer, text)
    if not located or ids[: len(prefix)] != prefix:
        return {}
    spans = np.array(located[: len(prefix)])
    offsets = np.where(spans[:, :1] < 0, -1, spans).astype(np.int32)
    read = text[: max(0, int(offsets[:, 1].max()))]
    return {"sources.offsets": offsets, "sources.text": np.frombuffer(read.encode(), np.uint8)}


def without_thoughts(answer: str) -> str:
    """An answer without what the model thought before it."""
    return re.sub(r"<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL)


def source_of(passages: Passages, number: int, score: float) -> Source:
    """A passage as a source."""
    passage = passages.all[number]
    text = passages.reading.original(passage.start, passage.end)
    return Source(passage.file.name, _place(passages, passage), round(score, 4), passage.start, passage.end, text)


def _place(passages: Passages, passage: Passage) -> str:
    """The part of the document; without parts the line of a plain text, or else the heading above."""
    if passage.place is not None:
        return passage.place.label()
    text, start = passages.reading.text, passage.file.start
    if passage.file.kind == "text":
        return f"line {text.count(chr(10), start, passage.start) + 1}"
    own_line = text.find("\n", passage.start)  # the passage may start with its heading
    headings = re.findall(r"^#+ (.{1,80})", text[start : own_line if own_line >= 0 else passage.end], re.MULTILINE)
    return f"section {headings[-1]}" if headings else ""
