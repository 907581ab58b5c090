"""What stands in the runs of a Word document beside text: signs, symbols, fields, what is hidden or raised."""

import re

from nectar_mlx.documents.archive import Element, attribute, child, children, local

SIGNS = {"tab": "\t", "ptab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "\u2011", "softHyphen": "\u00ad"}
_GREEK = "ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ", "αβχδεφγηιϕκλμνοπθρστυϖωξψζ"  # from A and from a in the font Symbol
_SYMBOLS = {
    "symbol": {
        **dict(zip(range(ord("A"), ord("Z") + 1), _GREEK[0], strict=True)),
        **dict(zip(range(ord("a"), ord("z") + 1), _GREEK[1], strict=True)),
        **dict(zip((0xA3, 0xA5, 0xAE, 0xB0, 0xB1, 0xB3, 0xB4, 0xB8, 0xB9, 0xBB), "≤∞→°±≥×÷≠≈", strict=True)),
        **dict(zip((0xA2, 0xB2, 0xB6, 0xC5, 0xCE, 0xD0, 0xD6, 0xE5, 0xF2), "′″∂⊕∈∠√∑∫", strict=True)),
    },
    "wingdings": dict(zip((0x6F, 0xA8, 0xE0, 0xFB, 0xFC, 0xFD, 0xFE), "☐☐→✗✓☒☑", strict=True)),
}


def symbol(item: Element) -> str:
    """A character of a symbol font, where it is one that Unicode has a place for."""
    code = attribute(item, "char")
    if not re.fullmatch(r"[0-9A-Fa-f]{1,4}", code):
        return ""
    number = int(code, 16)
    known = _SYMBOLS.get(attribute(item, "font").lower(), {}).get(number & 0xFF if number >= 0xF000 else number)
    return known or (chr(number) if number >= 32 and not 0xD800 <= number <= 0xF8FF else "•")


def instructions(root: Element) -> set[int]:
    """The texts and signs that tell a field what to show, with the fields in them, by their `id`.

    A field that never ends hides nothing.
    """
    shown: list[Element] = []
    opened: list[list[int]] = []  # of each open field: where its instructions start and, if known, end
    inside: list[tuple[int, int]] = []
    for item in root.iter():
        tag = local(item)
        if tag == "t" or tag in SIGNS or tag == "sym":
            shown.append(item)
        elif tag == "fldChar":
            kind = attribute(item, "fldCharType")
            if kind == "begin":
                opened.append([len(shown)])
            elif kind == "separate" and opened:
                opened[-1].append(len(shown))
            elif kind == "end" and opened:
                limits = [*opened.pop(), len(shown)]
                inside.append((limits[0], limits[1]))
    found: set[int] = set()
    done = 0
    for start, end in sorted(inside):
        found |= {id(item) for item in shown[max(start, done) : end]}
        done = max(done, end)
    return found


def form_field(item: Element) -> str:
    """What a box to tick or a list to choose from shows; its sign starts a field that has no text."""
    data = child(item, "ffData")
    if (box := child(data, "checkBox")) is not None:
        state = child(box, "checked")
        state = child(box, "default") if state is None else state
        return "☒" if state is not None and _is_on(state) else "☐"
    if (choices := child(data, "ddList")) is not None:
        entries = [attribute(entry, "val") for entry in children(choices, "listEntry")]
        result = child(choices, "result")
        given = "0" if result is None else attribute(result, "val")
        return entries[int(given)] if re.fullmatch("[0-9]{1,3}", given) and int(given) < len(entries) else ""
    return ""


def _is_on(state: Element) -> bool:
    return attribute(state, "val", "1") not in ("0", "false", "off")


def _properties(run: Element) -> dict[str, Element]:
    properties = child(run, "rPr")
    return {} if properties is None else {local(item): item for item in properties}


def is_hidden(run: Element) -> bool:
    vanish = _properties(run).get("vanish")
    return vanish is not None and _is_on(vanish)


def is_raised(run: Element) -> bool:
    align = _properties(run).get("vertAlign")
    return align is not None and attribute(align, "val") == "superscript"


def raised(text: str) -> str:
    """A raised number keeps its sense: 10^6 is not 106."""
    return f"^{text}" if re.fullmatch(r"[+\-−–\u2011]?\d+", text) else text
