"""Words broken at the end of a line: which hyphens were put there, and which belong to the word."""

import re
from collections import Counter
from collections.abc import Iterable

# First and last parts of words that keep their hyphen, used where the document does not show how it writes them.
_FIRST_PARTS = (
    "all anti cross ex far full half high ill left long low multi near non north open quasi right self semi short "
    "single soft south well wide two three four five six seven eight nine ten twenty thirty forty fifty sixty seventy "
    "eighty ninety father mother brother sister vice demi celui celle ceux celles кое юго северо"
)
_LAST_PARTS = (
    "aged based born bound driven effective faced free friendly known level looking made minded old oriented paced "
    "purpose ranging rate related scale sized specific standing style term trained type winning year years "
    "être même mêmes то либо нибудь таки"
)
_FIRST = frozenset(_FIRST_PARTS.split())
_LAST = frozenset(_LAST_PARTS.split())
_ADVERB = re.compile("(?:[сц]ки|ьи|ому|ему)$")  # по-русски, по-моему
_INVERTED = frozenset(["il", "elle", "on", "ils", "elles"])  # dit-il
_CONJUNCTIONS = frozenset(["und", "oder", "bzw", "sowie", "bis", "and", "or", "et", "и", "или"])  # "Ein- und Ausgang"
_HYPHENS = "\u2010\u00ad-"  # the last one would make a range elsewhere in a class
_BROKEN = re.compile(rf"[^\W_][{_HYPHENS}]$")
_WORD = re.compile(r"[^\W\d_]+(?:[-\u2010][^\W\d_]+)*")


def is_broken(line: str) -> bool:
    """Whether a line ends in a hyphen that stands right after a letter or a digit."""
    return _BROKEN.search(line) is not None


def goes_on_later(after: str) -> bool:
    """Whether the rest of a word stands behind the "and" with which a line starts: "Ein- und Ausgang"."""
    return re.split(r"\W", after, maxsplit=1)[0] in _CONJUNCTIONS


class Words:
    """How a document writes its words, where no line breaks them: the evidence for what a broken word is."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._count: Counter[str] = Counter()
        for line in lines:
            # The last word may be broken, and the first one may be the rest of another.
            self._count.update(word.casefold().replace("\u2010", "-") for word in _WORD.findall(line)[1:-1])

    def keeps_hyphen(self, before: str, after: str) -> bool:
        """Whether the hyphen at the end of `before` belongs to the word that goes on in `after`."""
        if before[-1] == "\u00ad":
            return False
        token = before[-200:].split()[-1][:-1]
        first, last = re.findall(r"[^\W_]*$", token)[0], re.findall(r"^[^\W_]*", after)[0]
        if not (first.isalpha() and last.isalpha()):  # numbers, addresses
            return True
        if not last.islower() and not _has_no_case(last):
            return not (first.isupper() and last.isupper() and len(first) > 1)
        if re.search(rf"[/@.:{_HYPHENS}]", token):  # an address, or a word with one hyphen already
            return True
        glued, apart = f"{first}{last}".casefold(), f"{first}-{last}".casefold()
        if self._count[glued] or self._count[apart]:
            return self._count[apart] > self._count[glued]
        goes_on = re.match(rf"[{_HYPHENS}]\w", after[len(last) :]) is not None
        is_adverb = first.casefold() == "по" and _ADVERB.search(last) is not None
        is_inverted = last in _INVERTED and first.endswith(("t", "d"))
        return len(first) == 1 or goes_on or is_adverb or is_inverted or first.casefold() in _FIRST or last in _LAST


def _has_no_case(text: str) -> bool:
    return text.lower() == text.upper()
