"""The words of a text in any language, as searching compares them.

Texts that look alike have equal words: compatibility forms (NFKC: ligatures, full-width letters), case, the digits of
all scripts, vowel points of Hebrew and Arabic, and characters that nobody sees make no difference. Scripts without
spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, ...) and Korean, whose words end in particles, are
cut into all pairs of neighbouring characters: so a question finds them without a dictionary.
"""

import unicodedata
from itertools import pairwise

import regex

_SCRIPTS = ("Han", "Hiragana", "Katakana", "Hangul", "Thai", "Lao", "Khmer", "Myanmar", "Tai_Le", "New_Tai_Lue", "Yi")
_PAIRED = r"[[" + "".join(rf"\p{{{script}}}" for script in _SCRIPTS) + r"ー]&&\p{L}]"
_PIECES = regex.compile(
    rf"(?V1)(?P<paired>(?:{_PAIRED}\p{{M}}*)+)"
    rf"|[[\p{{L}}\p{{N}}\p{{Pc}}]--{_PAIRED}][[\p{{L}}\p{{M}}\p{{N}}\p{{Pc}}]--{_PAIRED}]*"
)
_CHARACTER = regex.compile(r"\p{L}\p{M}*")  # with what stands above and below it
_SPACE = regex.compile("[\u200b\u2060\ufeff]")  # zero-width: between words, where a script has no other space
# Soft hyphens, joiners, marks of direction, tatweel; and the dot that stays where a Turkish İ becomes small.
_UNSEEN = regex.compile(r"[\p{Cf}\u0640\p{Variation_Selector}]|(?<=i)\u0307")
_POINTS = range(10, 36)  # combining classes of the vowel points of Hebrew and Arabic
_DIGITS = regex.compile(r"(?V1)[\p{Nd}--[0-9]]")
_POINTED = regex.compile(r"[\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670]")


def words(text: str, *, phrase: int = 1) -> list[str]:
    """The words of a text, and its phrases of up to `phrase` words."""
    single = [word for piece in _PIECES.finditer(folded(text)) for word in _words(piece)]
    return [" ".join(single[i : i + n]) for n in range(1, phrase + 1) for i in range(len(single) - n + 1)]


def folded(text: str) -> str:
    """The text without the differences that make no other word."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if text.isascii():
        return text
    text = _UNSEEN.sub("", _SPACE.sub(" ", text))
    text = _POINTED.sub(lambda m: "" if unicodedata.combining(m[0]) in _POINTS else m[0], text)
    return str(_DIGITS.sub(lambda m: str(unicodedata.digit(m[0])), text))


def _words(piece: "regex.Match[str]") -> list[str]:
    run = piece["paired"]
    if run is None:
        return [piece[0]]
    characters = _CHARACTER.findall(run)
    return [a + b for a, b in pairwise(characters)] or characters
