"""The styles of a Word document, and the numbers that Word sets before paragraphs: "2.1", "(b)", "Article IV"."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nectar_mlx.documents.archive import Element, attribute, child, children

_MOST_BASES = 20  # a style that stands on a style …
_MOST_LEVELS = 9
_MOST_LETTERED = 260  # "a" to "zzzzzzzzzz"
_ROMAN = (
    *((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl")),
    *((10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i")),
)


@dataclass(frozen=True)
class Style:
    """What a paragraph has from its style: the level of a heading (0: none), its list and the level in it."""

    heading: int = 0
    list_id: str = ""
    level: int | None = None


def styles(root: Element | None) -> dict[str, Style]:
    """The styles by their ids: those are translated, the names are not. What a style leaves open its base decides."""
    elements = {attribute(style, "styleId"): style for style in children(root, "style")}
    return {name: _style(name, elements) for name in elements}


def _style(name: str, elements: Mapping[str, Element]) -> Style:
    heading, list_id, level = 0, "", None
    for _ in range(_MOST_BASES):
        style = elements.get(name)
        if style is None:
            break
        properties = child(style, "pPr")
        heading = heading or _named_heading(style) or outline(properties)
        numbering = child(properties, "numPr")
        if numbering is not None and not list_id:
            list_id, level = _value(numbering, "numId"), _number(_value(numbering, "ilvl"))
        name = _value(style, "basedOn")
    return Style(heading, list_id, level)


def _named_heading(style: Element) -> int:
    match = re.fullmatch(r"heading ([1-6])|title", _value(style, "name").lower())
    return int(match[1] or 1) if match else 0


def outline(properties: Element | None) -> int:
    """The level of a heading that is one by its place in the outline; 0 for other text."""
    value = _value(properties, "outlineLvl")
    return int(value) + 1 if re.fullmatch("[0-5]", value) else 0


def _value(parent: Element | None, name: str) -> str:
    found = child(parent, name)
    return "" if found is None else attribute(found, "val")


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,4}", text) else None


@dataclass
class _Level:
    start: int
    kind: str
    text: str
    style: str
    is_legal: bool


@dataclass
class _List:
    """One numbering; several `w:num` may go on with it."""

    levels: dict[int, _Level]
    counts: list[int | None] = field(default_factory=lambda: [None] * _MOST_LEVELS)


class Numbering:
    """Counts the paragraphs of each list as Word does."""

    def __init__(self, root: Element | None) -> None:
        self._lists: dict[str, _List] = {}
        self._restarts: dict[str, dict[int, int]] = {}
        abstract = {attribute(item, "abstractNumId"): item for item in children(root, "abstractNum")}
        linked = {_value(item, "styleLink"): item for item in abstract.values()}
        made: dict[int, _List] = {}
        for number in children(root, "num"):
            item = abstract.get(_value(number, "abstractNumId"))
            if item is not None and (link := _value(item, "numStyleLink")):
                item = linked.get(link, item)
            if item is not None:
                key = attribute(number, "numId")
                self._lists[key] = made.setdefault(id(item), _List(_levels(item)))
                self._restarts[key] = _overrides(number)

    def marker(self, properties: Element | None, style: Style, style_id: str) -> tuple[str, int] | None:
        """The next number or "-" for a paragraph, and the depth of its list; None for one in no list."""
        own = child(properties, "numPr")
        list_id = _value(own, "numId") or style.list_id
        if (not list_id and own is None) or list_id == "0":
            return None
        level = _number(_value(own, "ilvl"))
        level = style.level if level is None else level
        found = self._lists.get(list_id)
        if level is None and found is not None:
            level = next((depth for depth, item in found.levels.items() if item.style == style_id), 0)
        level = level or 0
        if found is None or level not in found.levels:
            return "-", level
        return self._counted(found, list_id, level), level

    def _counted(self, found: _List, list_id: str, level: int) -> str:
        start = self._restarts[list_id].pop(level, None)
        count = found.counts[level]
        found.counts[level] = start if start is not None else found.levels[level].start if count is None else count + 1
        found.counts[level + 1 :] = [None] * (_MOST_LEVELS - level - 1)
        shown = found.levels[level]
        if shown.kind == "bullet":
            return "-"
        return re.sub("%([1-9])", lambda sign: _part(found, int(sign[1]) - 1, shown), shown.text).strip()


def _levels(item: Element) -> dict[int, _Level]:
    levels = {}
    for element in children(item, "lvl"):
        depth = _number(attribute(element, "ilvl"))
        if depth is not None and depth < _MOST_LEVELS:
            start = _number(_value(element, "start"))
            levels[depth] = _Level(
                1 if start is None else start,
                _value(element, "numFmt") or "decimal",
                _value(element, "lvlText")[:100],
                _value(element, "pStyle"),
                child(element, "isLgl") is not None,
            )
    return levels


def _overrides(number: Element) -> dict[int, int]:
    """The levels that start anew with this list, and their first numbers."""
    found = {}
    for override in children(number, "lvlOverride"):
        level, start = _number(attribute(override, "ilvl")), _number(_value(override, "startOverride"))
        if level is not None and start is not None:
            found[level] = start
    return found


def _part(found: _List, depth: int, shown: _Level) -> str:
    """One number of a marker such as "2.1"; a level that has not been used yet counts as its first."""
    level = found.levels.get(depth)
    if level is None:
        return ""
    count = found.counts[depth]
    return spelled(level.start if count is None else count, "decimal" if shown.is_legal else level.kind)


def spelled(number: int, kind: str) -> str:
    """A number as Word spells it: "decimal", "lowerLetter", "upperRoman" and so on."""
    match kind:
        case "none" | "bullet":
            return ""
        case "decimalZero":
            return f"{number:02}"
        case "lowerLetter" | "upperLetter" if 0 < number <= _MOST_LETTERED:
            letters = chr(ord("a") + (number - 1) % 26) * ((number - 1) // 26 + 1)
            return letters if kind == "lowerLetter" else letters.upper()
        case "lowerRoman" | "upperRoman" if 0 < number < 4000:
            letters = _roman(number)
            return letters if kind == "lowerRoman" else letters.upper()
    return str(number)


def _roman(number: int) -> str:
    letters = ""
    for value, sign in _ROMAN:
        letters += sign * (number // value)
        number %= value
    return letters
