"""Stop strings, found in the text of an answer whatever its tokens are.

Of several strings the one that is complete first ends the answer, and of those complete at the same character the
longest. So the result does not depend on how the text is divided into pieces. The search is Knuth, Morris and Pratt's:
one step a character and string.
"""

from collections.abc import Sequence

from ..errors import NectarError

MAX_STOPS, MAX_STOP_LENGTH = 4, 256


class StopStrings:
    """Ends a streamed text before the first of some strings.

    stops: at most MAX_STOPS of at most MAX_STOP_LENGTH characters, else NectarError. `found` is the string that ended
    the text, None as long as none has.
    """

    def __init__(self, stops: Sequence[str] = ()):
        stops = list(dict.fromkeys(stops))
        if len(stops) > MAX_STOPS:
            raise NectarError(f"there are {len(stops):,} stop strings: give at most {MAX_STOPS}")
        if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise NectarError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters")
        self._patterns = [_Pattern(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Takes the next piece and returns what is certainly before any stop string. "" once one was found."""
        if self.found is not None or not self._patterns:
            return "" if self.found is not None else text
        self._held += text
        for at, character in enumerate(text, len(self._held) - len(text)):
            complete = [pattern.text for pattern in self._patterns if pattern.advance(character)]
            if complete:
                self.found = complete[0]
                return self._release(at + 1 - len(self.found), rest="")
        return self._release(len(self._held) - max(pattern.matched for pattern in self._patterns))

    def finish(self) -> str:
        """What was held back, for a text that has ended by itself."""
        return self._release(len(self._held))

    def _release(self, end: int, *, rest: str | None = None) -> str:
        text, self._held = self._held[:end], self._held[end:] if rest is None else rest
        return text


class _Pattern:
    """A string and how much of it the end of the text so far is: `matched` characters."""

    def __init__(self, text: str):
        self.text, self.matched = text, 0
        self._shorter = [0] * (len(text) + 1)  # by length of a match: the next shorter one
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._shorter[length]
            length += text[i] == text[length]
            self._shorter[i + 1] = length

    def advance(self, character: str) -> bool:
        """Takes one character; whether the string is complete. Not to be called once it was."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)
