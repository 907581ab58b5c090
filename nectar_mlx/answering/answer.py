"""The text of an answer while it is written."""

from collections.abc import Sequence

from .stops import StopStrings
from .thoughts import Markers, Piece, ThoughtSplitter


class Answer:
    """Turns the pieces of text that a model writes into thoughts and answer, and ends it before a stop string.

    stops: strings before which the answer ends; they do not count in thoughts. markers, opened: as for
    `ThoughtSplitter`. After each piece ask `stopped`: then generation should end. `text` and `thoughts` are what was
    returned so far.

        answer = Answer(stops, Markers.of(tokenizer), opened=...)
        for response in stream_generate(...):
            show(answer.feed(response.text).answer)
            if answer.stopped:
                break
        show(answer.finish().answer)
    """

    def __init__(self, stops: Sequence[str] = (), markers: Markers | None = None, *, opened: bool = False):
        self._stops, self._splitter = StopStrings(stops), ThoughtSplitter(markers, opened=opened)
        self.text, self.thoughts = "", ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._stops.found is not None

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the answer."""
        return self._stops.found

    @property
    def thinking(self) -> bool:
        """Whether thoughts are open."""
        return self._splitter.thinking

    def feed(self, text: str) -> Piece:
        """Takes the next piece of the model's text."""
        thoughts, answer = self._splitter.feed(text)
        return self._add(thoughts, self._stops.feed(answer))

    def finish(self) -> Piece:
        """What was held back, once the model has ended. Nothing after a stop string."""
        thoughts, answer = self._splitter.finish()
        return self._add(thoughts, self._stops.feed(answer) + self._stops.finish())

    def _add(self, thoughts: str, answer: str) -> Piece:
        self.text, self.thoughts = self.text + answer, self.thoughts + thoughts
        return Piece(thoughts, answer)
