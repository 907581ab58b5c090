"""The styles of OpenDocument files: which lists are numbered, what is raised, what is hidden."""

import re
from collections.abc import Iterable

from nectar_mlx.documents.archive import Element, attribute, child, local
from nectar_mlx.documents.numbering import spelled

_KINDS = {"1": "decimal", "a": "lowerLetter", "A": "upperLetter", "i": "lowerRoman", "I": "upperRoman"}


class Styles:
    """What the parts of a file say about its lists and its spans."""

    def __init__(self, roots: Iterable[Element]) -> None:
        self._levels: dict[tuple[str, int], Element] = {}
        self._raised: set[str] = set()
        for style in (item for root in roots for item in root.iter()):
            if local(style) == "list-style":
                self._add_levels(style)
            elif local(style) == "style":
                properties = child(style, "text-properties")
                if properties is not None and attribute(properties, "text-position").startswith("super"):
                    self._raised.add(attribute(style, "name"))

    def _add_levels(self, style: Element) -> None:
        for level in style:
            number = attribute(level, "level")
            if local(level) == "list-level-style-number" and re.fullmatch("[0-9]{1,2}", number):
                self._levels[attribute(style, "name"), int(number) - 1] = level

    def is_raised(self, name: str) -> bool:
        return name in self._raised

    def number(self, style: str, depth: int, item: Element, last: int) -> int:
        """The number of an item behind the one with the number `last`; 0: the first."""
        level = self._levels.get((style, depth))
        start = attribute(item, "start-value")
        if not start and not last and level is not None:
            start = attribute(level, "start-value")
        return int(start) if re.fullmatch("[0-9]{1,6}", start) else last + 1

    def marker(self, style: str, depth: int, number: int) -> str:
        """What stands before an item: "2.", "(b)" or "-"."""
        level = self._levels.get((style, depth))
        kind = "" if level is None else attribute(level, "num-format")
        if level is None or not kind:
            return "-"
        shown = spelled(number, _KINDS.get(kind, "decimal"))
        return f"{attribute(level, 'num-prefix')}{shown}{attribute(level, 'num-suffix')}".strip()


def is_hidden(element: Element) -> bool:
    """Whether a section, a paragraph or a text is there but not shown."""
    tag = local(element)
    if tag == "section":
        return attribute(element, "display") == "none"
    return tag in ("hidden-text", "hidden-paragraph") and attribute(element, "is-hidden") == "true"
