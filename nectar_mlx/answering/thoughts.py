"""The thoughts of a model that thinks before it answers, apart from its answer.

Thoughts stand at the beginning: the prompt or the answer opens them, and the first end marker ends them. A marker
anywhere else is text that somebody writes about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from ..core.types import Tokenizer

_MOST_BLANK = 4  # characters of white space before thoughts; an answer that begins with more has none


@dataclass(frozen=True)
class Markers:
    """The texts that open and close a model's thoughts; `plain` opens an answer without thoughts, if anything does."""

    start: str
    end: str
    plain: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """Those of a model, as mlx-lm knows them, and those of gpt-oss; None for a model that does not think."""
        start, end = getattr(tokenizer, "think_start", None), getattr(tokenizer, "think_end", None)
        if start and end:
            return cls(start, end)
        vocabulary = tokenizer.get_vocab()
        if all(token in vocabulary for token in ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")):
            answer = "<|channel|>final<|message|>"
            return cls("<|channel|>analysis<|message|>", f"<|end|><|start|>assistant{answer}", answer)
        return None

    def opened(self, tokenizer: Tokenizer, prompt: Sequence[int], *, tail: int = 32) -> bool:
        """Whether the prompt's last `tail` tokens open a thought that they do not close: the template's doing."""
        text = tokenizer.decode(list(prompt[-tail:]))
        opening = text.rfind(self.start)
        return opening >= 0 and not text[opening + len(self.start) :].strip()


class Piece(NamedTuple):
    """What is new of the thoughts and of the answer."""

    thoughts: str = ""
    answer: str = ""


class ThoughtSplitter:
    """Divides a streamed text into thoughts and answer, without the markers and the white space around them.

    markers: None for a model that does not think: then everything is the answer. opened: whether the prompt has opened
    the thoughts.
    """

    def __init__(self, markers: Markers | None, *, opened: bool = False):
        self._markers = markers
        self._state = "answer" if markers is None else "thoughts" if opened else "undecided"
        self._held = ""
        self._trim = opened  # whether white space that follows is dropped

    @property
    def thinking(self) -> bool:
        return self._state == "thoughts"

    def feed(self, text: str) -> Piece:
        """Takes the next piece; holds back what may become a marker."""
        self._held += text
        thoughts = self._decide() if self._state == "undecided" else ""
        if self._state == "thoughts":
            thoughts += self._think()
        return Piece(thoughts, self._rest() if self._state == "answer" else "")

    def finish(self) -> Piece:
        """What was held back, for a text that has ended."""
        held, self._held = self._held, ""
        return Piece(held.strip() if self._trim else held.rstrip(), "") if self.thinking else Piece("", held)

    def _decide(self) -> str:
        """Reads the beginning: thoughts, an answer, or too short to tell."""
        assert self._markers is not None
        beginning = self._held.lstrip()
        openings = {self._markers.start: "thoughts"} | ({self._markers.plain: "answer"} if self._markers.plain else {})
        for opening, state in openings.items():
            if beginning.startswith(opening):
                self._held, self._state, self._trim = beginning[len(opening) :], state, True
                return ""
        blank = len(self._held) - len(beginning)
        if blank > _MOST_BLANK or not any(opening.startswith(beginning) for opening in openings):
            self._state = "answer"
        return ""

    def _think(self) -> str:
        assert self._markers is not None
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held
        thoughts, end, rest = self._held.partition(self._markers.end)
        if end:
            self._held, self._state, self._trim = rest, "answer", True
            return thoughts.rstrip()
        keep = len(thoughts.rstrip())
        # White space before the end marker is held back, and so is what may be its beginning.
        keep = min(keep, len(thoughts[: len(thoughts) - overlap(thoughts, self._markers.end)].rstrip()))
        self._held = thoughts[keep:]
        return thoughts[:keep]

    def _rest(self) -> str:
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held
        text, self._held = self._held, ""
        return text


def overlap(text: str, marker: str) -> int:
    """The length of the longest end of the text that begins the marker without being all of it."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)
